"""Graphs and memory counters of a GPU, pretended on a CPU, for tests of what is captured, measured and planned."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar, Final

import pytest
import torch

from tokenmill.executor import runner_factory
from tokenmill.runtime import model_runner

MIB: Final = 1 << 20
WEIGHT_BYTES: Final = 3 * MIB
BYTES_PER_TOKEN: Final = 1000
"""Memory that a step takes for each of its tokens."""


class FakeGraph:
    """A CUDA graph that remembers its pool."""

    pools: ClassVar[list[Any]] = []

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self.pools.append(pool)

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        pass


def pretend_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs without a GPU; the pools that captures take are added to the list."""
    handles = iter(range(10))
    monkeypatch.setattr(FakeGraph, "pools", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return FakeGraph.pools


class PretendedGpu:
    """The CPU as a device whose steps are measured and captured.

    It is the attention backend, too, which counts the tokens of steps: attention itself gives back its queries.
    """

    name = "triton"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.pools = pretend_graphs(monkeypatch)
        self.largest = 0  # tokens of the largest step since the counters were reset
        self.measured: list[int] = []  # of the steps that were measured
        self.max_tokens: int | None = None  # of a step that there is memory for
        monkeypatch.setattr(model_runner, "is_cuda", lambda device: True)
        monkeypatch.setattr(runner_factory, "is_cuda", lambda device: True)
        monkeypatch.setattr(runner_factory, "free_memory", lambda device: free - WEIGHT_BYTES)
        for name in ("empty_cache", "synchronize", "set_device"):
            monkeypatch.setattr(torch.cuda, name, lambda *device: None)
        for name in ("memory_allocated", "memory_reserved"):
            monkeypatch.setattr(torch.cuda, name, lambda device: WEIGHT_BYTES)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self._reset)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: WEIGHT_BYTES)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", self._peak)

    def forward(self, spec: Any, query: torch.Tensor, key: Any, value: Any, cache: Any, metadata: Any) -> torch.Tensor:
        """See `AttentionBackend.forward`."""
        num_tokens = query.shape[0]
        self.largest = max(self.largest, num_tokens)
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return query

    def _reset(self, device: Any) -> None:
        self.largest = 0

    def _peak(self, device: Any) -> int:
        self.measured.append(self.largest)
        return WEIGHT_BYTES + self.largest * BYTES_PER_TOKEN
