"""Sizes of captured steps. What they compute is tested on a GPU (tests/gpu)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.pretended_gpu import FakeGraph, pretend_graphs
from tokenmill.engine.plan import Row
from tokenmill.runtime import step_graphs
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_graphs import StepGraphs
from tokenmill.runtime.step_inputs import StepInputs
from tokenmill.runtime.step_sizes import StepSize, batch_bucket, kv_bucket, step_size, token_bucket

pytestmark = pytest.mark.spec("C1")


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
        return step_size(rows, 64, 4096, 2048, greedy=True)

    assert size(Row(0, 99, 1, True)) == StepSize(1, 0, 1024, True)
    assert size(*(Row(slot, 1500, 1, True) for slot in range(11))) == StepSize(12, 0, 2048, True)
    assert size(Row(0, 0, 128, True)) == StepSize(1, 128, 1024, True)
    assert size(Row(1, 5, 1, True), Row(0, 0, 100, False)) == StepSize(2, 128, 1024, True)
    assert size(Row(0, 4, 1, False)) == StepSize(
        1, 16, 1024, True
    )  # the last but one chunk of a prompt, one token long
    decode = [Row(slot, 9, 1, True) for slot in range(1, 40)]
    assert size(*decode, Row(0, 0, 100, True)) == StepSize(64, 192, 4096, True, 16)
    assert size(Row(0, 0, 513, True)) == StepSize(4, 768, 4096, True, 16)
    assert size(*decode, Row(0, 0, 2009, False)) == StepSize(64, 2048, 4096, True, 32)
    assert size(*(Row(slot, 0, 60, True) for slot in range(17))) is None  # many short prompts
    assert size(*(Row(slot, 0, 60, True) for slot in range(32))) == StepSize(64, 2048, 4096, True, 32)
    assert size(Row(0, 0, 1025, True)) is None  # too much padding
    assert size(Row(0, 0, 2049, True)) is None
    assert size(Row(0, 0, 8, True, prompt_logprobs=True)) is None


@pytest.mark.parametrize("max_tokens", [24, 512, 700, 5000, 8192])
def test_tokens_are_padded_by_little_and_there_are_few_sizes(max_tokens: int) -> None:
    buckets = {count: token_bucket(count, max_tokens) for count in range(1, max_tokens + 10)}
    assert all(buckets[count] is None for count in range(max_tokens + 1, max_tokens + 10))
    assert buckets[max_tokens] == max_tokens, "the largest step is not padded"
    found = {count: bucket for count, bucket in buckets.items() if bucket is not None}
    assert all(count <= bucket <= max_tokens for count, bucket in found.items())
    assert all(bucket <= 1.1 * count for count, bucket in found.items() if count > 1024)
    assert len(set(found.values())) <= 30
    assert len(found) >= 0.85 * max_tokens


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs without a GPU: the pools that captures took."""
    return pretend_graphs(monkeypatch)


def make_graphs(step: Any, max_tokens: int = 512) -> StepGraphs:
    return StepGraphs(step, SlotState(4, 1024, 16, torch.device("cpu")), 4, max_tokens)


def test_a_capture_that_failed_leaves_no_pool_behind(pools: list[Any]) -> None:
    """torch refuses to capture into a pool whose only capture was given up; without memory a step is tried again."""
    outcomes: list[Any] = ["eager", torch.OutOfMemoryError("no memory"), "captured"]

    def step(inputs: Any, greedy: bool) -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    graphs = make_graphs(step)
    rows = [Row(slot=0, start=3, num_tokens=1, sample=True)]
    size = graphs.size_of(rows, greedy=True)
    assert size is not None
    assert graphs.run(rows, size) == "eager"
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run(rows, size)
    assert graphs.run(rows, size) == "captured"
    assert graphs.run(rows, size) == "captured", "replayed"
    assert pools == [0, 1]


def tell_shape(inputs: StepInputs, greedy: bool) -> Any:
    return inputs.slots.shape[0], inputs.input_ids.shape[0]


def test_a_step_with_prompts_that_cannot_be_captured_runs_eagerly_from_then_on(pools: list[Any]) -> None:
    graphs = make_graphs(tell_shape, 1024)
    short, long = [Row(0, 0, 20, True)], [Row(0, 0, 600, True)]
    sizes = [graphs.size_of(rows, greedy=True) for rows in (short, long)]
    assert sizes[0] is not None and sizes[1] is not None
    for _ in range(2):
        assert graphs.run(short, sizes[0]) == (1, 32)
    assert graphs.run(long, sizes[1]) == (4, 768)
    assert graphs.next_run(sizes[1])[0] == "capture"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeGraph, "capture_end", refuse)
        assert graphs.run(long, sizes[1]) == (4, 768), "computed all the same"
    assert graphs.size_of(long, greedy=True) is None
    assert graphs.size_of(short, greedy=True) == sizes[0], "what is captured is replayed"
    assert graphs.next_run(sizes[0]) == ("replay", sizes[0])
    assert graphs.size_of([Row(0, 3, 1, True)], greedy=True) is not None, "decode steps are captured"


def refuse(graph: FakeGraph) -> None:
    raise torch.OutOfMemoryError("no memory")


def test_what_is_captured_at_start_serves_smaller_sizes_first(pools: list[Any]) -> None:
    shapes: list[Any] = []

    def step(inputs: StepInputs, greedy: bool) -> Any:
        shapes.append(tell_shape(inputs, greedy))
        return shapes[-1]

    graphs = make_graphs(step, 1024)
    for run in graphs.first_runs():
        run()
    assert shapes == [(4, 1024), (4, 4), (2, 2), (1, 1)]
    graphs.capture_at_start()
    assert shapes[4:] == shapes[:4], "each is captured, the largest first"
    assert len(pools) == 4 and set(pools) == {0}, "in the memory of the largest"
    three = [Row(slot, 9, 1, True) for slot in range(3)]
    largest = graphs.size_of([*three, Row(3, 0, 1021, True)], greedy=True)
    assert largest is not None and graphs.next_run(largest) == ("replay", largest)
    size = graphs.size_of(three, greedy=False)
    assert size is not None and [graphs.next_run(size)[0], graphs.run(three, size)] == ["first", (4, 4)]
    graphs.run(three, size)
    one = three[:1]
    size = graphs.size_of(one, greedy=False)
    assert size is not None
    assert graphs.next_run(size) == ("replay", StepSize(4, 0, 1024, False))
    times = step_graphs.RUNS_IN_LARGER[0]
    assert [graphs.run(one, size) for _ in range(times + 2)] == [*[(4, 4)] * times, (1, 1), (1, 1)]
    assert graphs.next_run(size) == ("replay", size)


def test_graphs_of_steps_with_prompts_are_bounded(pools: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graphs, "MAX_PROMPT_GRAPHS", 2)
    graphs = make_graphs(tell_shape)
    sizes = []
    for num_tokens in (10, 20, 100):
        rows = [Row(0, 0, num_tokens, True)]
        size = graphs.size_of(rows, greedy=True)
        sizes.append(size)
        for _ in range(2 if size is not None else 0):
            assert size is not None
            graphs.run(rows, size)
    assert len(pools) == 2 and sizes[2] is None
    assert graphs.size_of([Row(0, 3, 1, True)], greedy=True) is not None
