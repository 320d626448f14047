"""Times of GPU work: launches captured in one CUDA graph over rotating inputs, so that neither launch gaps nor the L2
cache decide. Used by the scripts of this folder.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

ROTATED_BYTES = 200 * 2**20
"""Inputs of all calls together, several times the 50 MB of L2."""
MAX_SETS = 512


def num_sets(bytes_per_call: float) -> int:
    """Sets of inputs to rotate among, for calls that read `bytes_per_call`."""
    return max(2, min(MAX_SETS, int(ROTATED_BYTES / max(bytes_per_call, 1)) + 1))


def graph_time(calls: Sequence[Callable[[], object]], *, launches: int = 20, replays: int = 7) -> float:
    """Seconds of one call: the median over replays of a graph that holds all `calls`, repeated to `launches` or more."""
    repeats = -(-launches // len(calls))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()  # compiles, and lets libraries make their workspaces
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times) / (repeats * len(calls))


def eager_overhead(call: Callable[[], object], *, repeats: int = 200) -> float:
    """Seconds of host time of one call outside a graph (the device keeps up with small work)."""
    import time

    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats)
        torch.cuda.synchronize()
    return statistics.median(times)
