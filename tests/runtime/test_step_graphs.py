"""Sizes of captured steps. What they compute is tested on a GPU (tests/gpu)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch

from tokenmill.engine.plan import Row
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_graphs import StepGraphs, StepSize, batch_bucket, kv_bucket, step_size


def test_batches_are_padded_by_little_and_there_are_few_sizes() -> None:
    buckets = [batch_bucket(rows, 2048) for rows in range(1, 2049)]
    assert all(rows <= bucket <= max(rows + 3, rows * 1.25) for rows, bucket in enumerate(buckets, start=1))
    assert len(set(buckets)) <= 64
    assert buckets == sorted(buckets)
    assert batch_bucket(61, 61) == 61


def test_context_bounds_are_powers_of_two_within_the_longest_sequence() -> None:
    bounds = [kv_bucket(length, 5000, 8) for length in (1, 1024, 1025, 2048, 4097, 5000)]
    assert bounds == [1024, 1024, 2048, 2048, 5000, 5000]
    assert kv_bucket(3, 256, 8) == 256
    assert kv_bucket(3, 5000, 64) == 5000  # many rows: one graph for all contexts


def test_which_steps_are_captured() -> None:
    def size(*rows: Row) -> StepSize | None:
        return step_size(rows, 64, 4096, greedy=True)

    assert size(Row(0, 99, 1, True)) == StepSize(1, 0, 1024, True)
    assert size(*(Row(slot, 1500, 1, True) for slot in range(11))) == StepSize(12, 0, 2048, True)
    assert size(Row(0, 0, 128, True)) == StepSize(1, 128, 1024, True)
    assert size(Row(1, 5, 1, True), Row(0, 0, 100, False)) == StepSize(2, 128, 1024, True)
    assert size(Row(0, 4, 1, False)) == StepSize(
        1, 16, 1024, True
    )  # the last but one chunk of a prompt, one token long
    assert size(Row(0, 0, 513, True)) is None
    assert size(*(Row(slot, 0, 2, True) for slot in range(17))) is None
    assert size(Row(0, 0, 8, True, prompt_logprobs=True)) is None


class FakeGraph:
    """A CUDA graph that remembers its pool."""

    pools: ClassVar[list[Any]] = []

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self.pools.append(pool)

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        pass


def test_a_capture_that_failed_leaves_no_pool_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to capture into a pool whose only capture was given up; without memory a step is tried again."""
    handles = iter(range(10))
    monkeypatch.setattr(FakeGraph, "pools", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    outcomes: list[Any] = ["eager", torch.OutOfMemoryError("no memory"), "captured"]

    def step(inputs: Any, greedy: bool) -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    graphs = StepGraphs(step, SlotState(4, 64, 16, torch.device("cpu")), 4)
    rows = [Row(slot=0, start=3, num_tokens=1, sample=True)]
    size = graphs.size_of(rows, greedy=True)
    assert size is not None
    assert graphs.run(rows, size) == "eager"
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run(rows, size)
    assert graphs.run(rows, size) == "captured"
    assert graphs.run(rows, size) == "captured", "replayed"
    assert FakeGraph.pools == [0, 1]
