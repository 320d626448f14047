"""What stands between an engine and its runner to see where the time of steps goes, for `llama8b`.

`StepTrace` (`--trace`) notes for each step its size, how it was run, the host's time to launch it and to wait for it,
and the device's clock at its beginning and end. `DecodeWindow` (`--profile`) profiles some decode steps and nothing
before or after them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch._C._autograd import DeviceType

from tokenmill import LLM
from tokenmill.bench.kernels import Kernel, StepTable, step_table
from tokenmill.bench.limits import measure_limits
from tokenmill.bench.step_kinds import linear_nbytes
from tokenmill.engine.plan import BatchPlan, StepOutput
from tokenmill.program.costs import StepSize


@dataclass
class TracedStep:
    """One step. Times in seconds; events are of the device.

    Args:
        kind: `eager`, `first` (of its size, run eagerly), `capture`, `replay`, or `larger` (replayed as a larger size).
        num_rows, num_tokens: of the plan.
        launch: host time of the launch.
        wait: host time of the collection.
        begin, end: around what the step does on the device.
    """

    kind: str
    num_rows: int
    num_tokens: int
    launch: float
    begin: torch.cuda.Event
    end: torch.cuda.Event
    wait: float = 0.0


class StepTrace:
    """A `Runner` that times another one.

    Args:
        runner: a `ModelRunner`.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.steps: list[TracedStep] = []

    def launch(self, plan: BatchPlan) -> Any:
        """Start the step."""
        started = time.perf_counter()
        kind = self._kind_of(plan)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        pending = self._runner.launch(plan)
        end.record()
        launch = time.perf_counter() - started
        step = TracedStep(kind, len(plan.rows), plan.num_tokens, launch, begin, end)
        self.steps.append(step)
        return pending, step

    def collect(self, pending: Any) -> StepOutput:
        """Wait for the step and read what it gave."""
        launched, step = pending
        started = time.perf_counter()
        output: StepOutput = self._runner.collect(launched)
        step.wait = time.perf_counter() - started
        return output

    def run(self, plan: BatchPlan) -> StepOutput:
        """Launch and collect."""
        return self.collect(self.launch(plan))

    def report(self, seconds: float) -> None:
        """Print totals by kind for the steps since the last report, which took `seconds`."""
        torch.cuda.synchronize()
        steps, self.steps = self.steps, []
        gaps = [0.0] + [max(0.0, a.end.elapsed_time(b.begin)) for a, b in pairwise(steps)]
        busy = [step.begin.elapsed_time(step.end) for step in steps]
        num_tokens = sum(step.num_tokens for step in steps)
        print(
            f"{len(steps)} steps, {num_tokens} tokens, {seconds:.2f} s: device in steps {sum(busy) / 1e3:.2f} s, "
            f"between them {sum(gaps) / 1e3:.2f} s; host waits {sum(step.wait for step in steps):.2f} s"
        )
        for kind, prompts in product(("replay", "larger", "capture", "first", "eager"), (False, True)):
            of_kind = [
                index
                for index, step in enumerate(steps)
                if step.kind == kind and prompts == (step.num_tokens > step.num_rows)
            ]
            if of_kind:
                num_tokens = sum(steps[i].num_tokens for i in of_kind)
                print(
                    f"  {kind:8} {'prompts' if prompts else 'decode':8} {len(of_kind):5} steps {num_tokens:8} tokens:"
                    f" device {sum(busy[i] for i in of_kind) / 1e3:6.2f} s,"
                    f" gaps before {sum(gaps[i] for i in of_kind):8.1f} ms,"
                    f" launch {sum(steps[i].launch for i in of_kind) * 1e3:8.1f} ms,"
                    f" host waits {sum(steps[i].wait for i in of_kind):6.2f} s"
                )
        slowest = sorted(range(len(steps)), key=lambda index: -gaps[index] - steps[index].launch * 1e3)[:6]
        for index in sorted({*slowest, *range(0, len(steps), max(1, len(steps) // 12))}):
            step = steps[index]
            print(
                f"    step {index:5} {step.kind:8} rows {step.num_rows:5} tokens {step.num_tokens:5}: device"
                f" {busy[index]:7.2f} ms, gap {gaps[index]:6.2f},"
                f" launch {step.launch * 1e3:6.2f}, wait {step.wait * 1e3:6.2f}"
            )

    def _kind_of(self, plan: BatchPlan) -> str:
        graphs = self._runner._graphs
        size = None if graphs is None else graphs.size_of(plan.rows, greedy=True)  # benchmarks are greedy
        if size is None:
            return "eager"
        how, to_run = graphs.next_run(size)
        return "larger" if to_run != size else str(how)


class DecodeWindow:
    """A `Runner` that profiles the kernels of some decode steps of another one.

    Args:
        runner: a `ModelRunner`.
        num_rows: rows of the steps that count.
        num_skipped: such steps before the window opens.
        num_steps: such steps in the window.
    """

    def __init__(self, runner: Any, num_rows: int, *, num_skipped: int = 8, num_steps: int = 32) -> None:
        self._runner = runner
        self._num_rows = num_rows
        self._num_skipped = num_skipped
        self._num_steps = num_steps
        self._num_seen = 0
        self._lens: list[float] = []
        self._profile: torch.profiler.profile | None = None

    def launch(self, plan: BatchPlan) -> Any:
        """Start the step; opens and closes the window."""
        is_decode = len(plan.rows) == self._num_rows == plan.num_tokens
        if is_decode and self._num_seen == self._num_skipped:
            torch.cuda.synchronize()
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profile.start()
        if is_decode and self._num_skipped <= self._num_seen < self._num_skipped + self._num_steps:
            self._lens.append(statistics.mean(row.start + 1 for row in plan.rows))
        pending = self._runner.launch(plan)
        if is_decode:
            self._num_seen += 1
            if self._num_seen == self._num_skipped + self._num_steps:
                assert self._profile is not None
                torch.cuda.synchronize()
                self._profile.stop()
        return pending

    def collect(self, pending: Any) -> StepOutput:
        """Wait for the step and read what it gave."""
        output: StepOutput = self._runner.collect(pending)
        return output

    def run(self, plan: BatchPlan) -> StepOutput:
        """Launch and collect."""
        return self.collect(self.launch(plan))

    def table(self, llm: LLM) -> StepTable:
        """What the operations of a step take beside the limits of the device, which is idle now."""
        assert self._profile is not None and self._num_seen >= self._num_skipped + self._num_steps
        kernels = uncovered(
            Kernel(event.name, event.time_range.start, event.time_range.elapsed_us())
            for event in self._profile.events() or ()
            if event.device_type == DeviceType.CUDA and not event.name.startswith("Mem")
        )
        description, nbytes = llm.description, linear_nbytes(llm)
        step = StepSize(
            num_tokens=self._num_rows,
            num_rows=self._num_rows,
            num_sequences=self._num_rows,
            context_len=round(statistics.mean(self._lens)),
            cache_nbytes=getattr(torch, description.cache_dtype).itemsize,
        )
        limits = measure_limits(torch.device(description.device), float8=nbytes == 1.0)
        title = f"Decode steps of {self._num_rows} sequences, {step.context_len:,} tokens of context"
        return step_table(title, kernels, self._num_steps, description.model, step, limits, linear_nbytes=nbytes)

    def report(self, num_kernels: int = 26) -> None:
        """Print the kernels of one step, longest first."""
        assert self._profile is not None and self._num_seen >= self._num_skipped + self._num_steps
        events = sorted(self._profile.key_averages(), key=lambda event: -event.device_time_total)
        steps = self._num_steps
        total = sum(event.device_time_total for event in events) / steps
        print(
            f"kernels of a decode step of {self._num_rows} rows, context {statistics.mean(self._lens):.0f} tokens,"
            f" mean of {steps}: {sum(event.count for event in events) / steps:.0f} launches, {total:.1f} us in all"
        )
        for event in events[:num_kernels]:
            print(f"{event.device_time_total / steps:10.1f} us {event.count / steps:6.1f} x  {event.key[:100]}")


def uncovered(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Kernels in order, each from the end of all before it: one that overlaps them has waited until then."""
    found, end = [], 0.0
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        start = max(kernel.start, end)
        end = max(end, kernel.start + kernel.microseconds)
        found.append(kernel._replace(start=start, microseconds=max(0.0, end - start)))
    return found
