"""A profiled run: where the time goes, as a table of kernels and as a timeline for https://ui.perfetto.dev.

The timeline is the one of torch's profiler (operations of all threads, GPU kernels, the runner's phases), with the
engine's steps as tracks of their own. Called by `tokenmill bench --profile`, after the measurement: profiling slows an
engine down, so nothing is measured while it runs.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch._C._autograd import DeviceType
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity

from tokenmill.bench.client import run_requests
from tokenmill.bench.kernels import StepTable
from tokenmill.bench.step_kinds import step_tables
from tokenmill.bench.workload import BenchmarkRequest
from tokenmill.errors import InvalidParameterError
from tokenmill.telemetry.stats import StepStats

if TYPE_CHECKING:
    from tokenmill.llm import LLM

MAX_OUTPUT_LEN = 32
"""Answers of a profiled run: a timeline of thousands of steps can be opened by nothing."""
STEPS_PROCESS = 1 << 30
"""Number of the process that the steps' tracks are shown under; no real one has it."""
NUM_TABLE_ROWS = 25


@dataclass(frozen=True, slots=True)
class KernelTime:
    """All launches of one kernel, or on a CPU all calls of one operation.

    Args:
        name: as the profiler knows it.
        count: launches or calls.
        seconds: of them all; of operations without those that they call.
        share: of the seconds of all kernels.
        flops: arithmetic operations, where the profiler knows them; else 0.
    """

    name: str
    count: int
    seconds: float
    share: float
    flops: int


@dataclass(frozen=True, slots=True)
class Profile:
    """What a profiled run found.

    Args:
        path: of the timeline.
        device: `cuda` if the kernels ran on a GPU, else `cpu`.
        seconds: of the run.
        steps: of the engine.
        kernels: the longest first.
        tables: on a GPU, where the time of decode steps and of steps of prompts goes, beside the device's limits.
    """

    path: Path
    device: str
    seconds: float
    steps: tuple[StepStats, ...]
    kernels: tuple[KernelTime, ...]
    tables: tuple[StepTable, ...] = ()

    def print(self, console: Console) -> None:
        """The tables of steps, and the one of all kernels."""
        for step_table in self.tables:
            step_table.print(console)
        what = "kernel" if self.device == "cuda" else "operation"
        table = Table(
            box=SIMPLE, title=f"{len(self.steps)} steps in {self.seconds:.2f} s, by {what}", title_justify="left"
        )
        table.add_column(what.capitalize(), no_wrap=True, max_width=60)
        for heading in ("Calls", "Total ms", "Mean us", "Share", "GFLOP/s"):
            table.add_column(heading, justify="right")
        for kernel in self.kernels[:NUM_TABLE_ROWS]:
            rate = f"{kernel.flops / kernel.seconds / 1e9:,.0f}" if kernel.flops and kernel.seconds else ""
            mean = kernel.seconds / kernel.count * 1e6
            table.add_row(
                kernel.name,
                f"{kernel.count:,}",
                f"{kernel.seconds * 1e3:,.2f}",
                f"{mean:,.1f}",
                f"{kernel.share:.1%}",
                rate,
            )
        console.print(table)


def check_profiling(llm: LLM) -> None:
    """Refuse what cannot be profiled.

    Raises:
        InvalidParameterError: the engine runs in another process.
    """
    if llm.args.num_replicas:
        raise InvalidParameterError(
            "An engine in a worker process cannot be profiled from here.",
            field="profile",
            remedy="Leave out num_replicas.",
        )


def run_profile(
    llm: LLM, requests: Sequence[BenchmarkRequest], path: Path, *, concurrency: int | None = None
) -> Profile:
    """Send `requests`, their answers cut to `MAX_OUTPUT_LEN` tokens, and write the timeline to `path`.

    Args:
        llm: should keep records of its steps (`StatsConfig.iter_stats_max_iterations`), or the timeline has none.
        requests: sent at once.
        path: replaced if it exists.
        concurrency: most requests under way at the same time; None: no limit.

    Raises:
        InvalidParameterError: the engine runs in another process.
        OSError: the file cannot be written.
    """
    check_profiling(llm)
    short = [BenchmarkRequest(request.prompt, min(request.output_len, MAX_OUTPUT_LEN)) for request in requests]
    first_step = llm.stats().num_steps
    on_gpu = llm.description.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    every_thread = _ExperimentalConfig(profile_all_threads=True)  # the engine has a thread of its own
    started = time.perf_counter()
    with torch.profiler.profile(
        activities=activities, with_flops=True, acc_events=True, experimental_config=every_thread
    ) as profiler:
        asyncio.run(run_requests(llm, short, concurrency=concurrency))
        if on_gpu:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    steps = tuple(step for step in llm.stats().recent_steps if step.step >= first_step)
    kernels = _kernel_times(profiler.key_averages(), on_gpu=on_gpu)
    profiler.export_chrome_trace(str(path))
    timeline = json.loads(path.read_text("utf-8"))
    tables = step_tables(llm, timeline, steps) if on_gpu else ()
    _add_to_timeline(timeline, steps, kernels, tables)
    path.write_text(json.dumps(timeline), "utf-8")
    return Profile(path, "cuda" if on_gpu else "cpu", seconds, steps, kernels, tables)


def _kernel_times(events: Iterable[Any], *, on_gpu: bool) -> tuple[KernelTime, ...]:
    found = []
    for event in events:
        is_kernel = event.device_type != DeviceType.CPU
        if is_kernel != on_gpu or (on_gpu and event.is_user_annotation):
            continue  # on a CPU the runner's phases count for what they do besides calling operations
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            found.append((event.key, event.count, microseconds / 1e6, int(event.flops or 0)))
    total = sum(seconds for _, _, seconds, _ in found) or 1.0
    found.sort(key=lambda kernel: -kernel[2])
    return tuple(KernelTime(name, count, seconds, seconds / total, flops) for name, count, seconds, flops in found)


def _add_to_timeline(
    timeline: dict[str, Any], steps: Sequence[StepStats], kernels: Sequence[KernelTime], tables: Sequence[StepTable]
) -> None:
    """Put the steps beside what torch wrote, and the tables beside the timeline."""
    base_time = timeline.get("baseTimeNanoseconds", 0) / 1e9
    to_timeline = time.time() - time.monotonic() - base_time  # seconds; the profiler counts from its base time
    timeline["traceEvents"] += _step_events(steps, to_timeline)
    timeline["kernels"] = [asdict(kernel) for kernel in kernels]
    timeline["steps"] = [asdict(table) for table in tables]


def _step_events(steps: Sequence[StepStats], to_timeline: float) -> list[dict[str, Any]]:
    """Spans on two tracks in turn, since a step is launched before the one ahead of it ends."""
    shared: dict[str, Any] = {"pid": STEPS_PROCESS}
    events: list[dict[str, Any]] = [
        {**shared, "ph": "M", "name": "process_name", "args": {"name": "tokenmill: engine steps"}},
        {**shared, "ph": "M", "name": "process_sort_index", "args": {"sort_index": -1}},
    ]
    events += [
        {**shared, "ph": "M", "tid": track, "name": "thread_name", "args": {"name": f"{name} steps"}}
        for track, name in enumerate(("even", "odd"))
    ]
    for step in steps:
        counts = {"prefill": step.num_prefills, "decode": step.num_decodes}
        events.append({
            **shared, "ph": "X", "cat": "step", "tid": step.step % 2,
            "name": " + ".join(f"{count} {kind}" for kind, count in counts.items() if count),
            "ts": (step.end_time - step.duration + to_timeline) * 1e6, "dur": step.duration * 1e6,
            "args": {
                "step": step.step, "prompt tokens": step.num_prompt_tokens, "tokens": step.num_generated_tokens,
                "running": step.num_running, "waiting": step.num_waiting, "free blocks": step.kv_cache.num_free_blocks,
            },
        })  # fmt: skip
    return events
