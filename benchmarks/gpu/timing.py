"""Times of GPU work, and the file of results: launches captured in one CUDA graph over rotating inputs, so that neither
launch gaps nor the L2 cache decide. Used by the scripts of this folder.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from benchmarks.result_file import describe_run, write_document

ROTATED_BYTES = 200 * 2**20
"""Inputs of all calls together, several times the 50 MB of L2."""
MAX_SETS = 512
MAX_GRAPH_SECONDS = 4e-3
READ_BANDWIDTH = 3.06e12
"""Bytes a second that an H100 80GB (SXM) was seen to read."""
BF16_FLOPS = 798e12
FP8_FLOPS = 1330e12


@dataclass(frozen=True)
class Row:
    """One figure; `goal`, `peer` (another way that was timed) and `limit` are in the same unit, None if unknown."""

    work: str
    metric: str
    value: float
    unit: str
    goal: float | None = None
    peer: float | None = None
    limit: float | None = None


def num_sets(bytes_per_call: float) -> int:
    """Sets of inputs to rotate among, for calls that read `bytes_per_call`."""
    return max(2, min(MAX_SETS, int(ROTATED_BYTES / max(bytes_per_call, 1)) + 1))


def graph_time(calls: Sequence[Callable[[], object]], *, launches: int = 20, replays: int = 7) -> float:
    """Seconds of one call: the median over replays of a graph of all `calls`, repeated to `launches` or more."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()  # compiles, and lets libraries make their workspaces
    stream.synchronize()
    # Long calls are repeated less: minutes of full power would lower the clocks for those that come after.
    launches = min(launches, int(MAX_GRAPH_SECONDS / event_time(calls[0])) + 1)
    repeats = -(-launches // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    times = [event_time(graph.replay) for _ in range(replays)]
    return statistics.median(times) / (repeats * len(calls))


def event_time(call: Callable[[], object]) -> float:
    """Seconds on the device of what one call launches."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_time(call: Callable[[], object], *, repeats: int = 100) -> float:
    """Seconds of host time of one call outside a graph; the median of five tries."""
    call()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats)
    torch.cuda.synchronize()
    return statistics.median(times)


def write_results(benchmark: str, rows: Sequence[Row], path: Path) -> None:
    """Write the figures with what they were taken on."""
    document = describe_run(benchmark, torch.cuda.get_device_name(), triton=triton.__version__)
    write_document(path, {**document, "rows": [asdict(row) for row in rows]})
