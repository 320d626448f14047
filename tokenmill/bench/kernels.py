"""Which operation of the model a GPU kernel belongs to, and what it reaches of the device's limits.

Kernels are told by their names, and linear layers, which share kernels, by their order in a step. What an operation
moves and computes comes from `models.step_costs`. Called by `profile` and by the scripts in `benchmarks/`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from tokenmill.bench.limits import DeviceLimits
from tokenmill.models.config import ModelConfig
from tokenmill.models.step_costs import linear_order, step_costs
from tokenmill.program.costs import Cost, StepSize

COMPANIONS: Final = ("_combine_kernel", "_splits_kernel", "splitKreduce")
"""Kernels that end what the kernel before them began."""

PATTERNS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    (
        "attention",
        (
            "_decode_kernel",
            "_decode_heads_kernel",
            "_prefill_kernel",
            "_prompts_kernel",
            "_attention_kernel",
            "flash",
            "fmha",
            "BatchDecode",
        ),
    ),
    ("rope and cache write", ("rope", "_write_kernel", "_write_float8_kernel")),
    ("step inputs", ("_rotation_kernel", "_decode_inputs_kernel")),
    ("norms", ("rms_norm",)),
    ("activation", ("_gated",)),
    (
        "experts",
        (
            *("_pair_", "_gate_up_kernel", "_rows_kernel", "_many_kernel"),
            *("_route_kernel", "_sort_kernel", "_count_kernel", "_place_kernel", "expert"),
        ),
    ),
    ("sampling", ("argmax", "_parts_kernel", "_choose_kernel", "_sample")),
    ("linear", ("matvec", "small_batch", "_product_kernel", "gemm", "gemv", "nvjet", "cutlass", "cublas", "xmma")),
    ("quantization", ("quantize", "_static_kernel")),
)
"""Parts of the names of an operation's kernels; the first line that fits counts."""

LINEAR: Final = "linear"


class Kernel(NamedTuple):
    """One launch: its name, its start on the profiler's clock, and how long it ran; microseconds."""

    name: str
    start: float
    microseconds: float


@dataclass(frozen=True, slots=True)
class OperationTime:
    """All kernels of one operation in a step.

    Args:
        operation: a name of `step_costs`, or what else the kernels do.
        kernels: their names, the longest-running first.
        calls: launches in a step.
        microseconds: of a step.
        cost: of a step; None if the operation is not one of the model's.
        seconds_at_limit: the time that the cost takes at the device's limits.
    """

    operation: str
    kernels: tuple[str, ...]
    calls: float
    microseconds: float
    cost: Cost | None
    seconds_at_limit: float

    @property
    def of_limit(self) -> float | None:
        """Share of the device's limit that is reached; None without a cost."""
        return None if self.cost is None else self.seconds_at_limit * 1e6 / self.microseconds


@dataclass(frozen=True, slots=True)
class StepTable:
    """Where the time of steps of one size goes.

    Args:
        title: which steps.
        num_steps: that the numbers are the mean of.
        limits: of the device.
        rows: the longest first.
    """

    title: str
    num_steps: int
    limits: DeviceLimits
    rows: tuple[OperationTime, ...]

    @property
    def microseconds(self) -> float:
        """Of all kernels of a step."""
        return sum(row.microseconds for row in self.rows)

    def print(self, console: Console) -> None:
        """The table."""
        limits = self.limits
        title = (
            f"{self.title}: {self.microseconds:,.0f} us in kernels, mean of {self.num_steps} steps; limits here: "
            f"{limits.read_bandwidth / 1e12:.2f} TB/s, {limits.flops / 1e12:,.0f} TFLOP/s"
        )
        table = Table(box=SIMPLE, title=title, title_justify="left")
        table.add_column("Operation", no_wrap=True)
        table.add_column("Kernels", no_wrap=True, max_width=44)
        for heading in ("Calls", "us", "Share", "MB", "GFLOP", "Achieved", "Of limit"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(*self._cells(row))
        console.print(table)

    def _cells(self, row: OperationTime) -> tuple[str, ...]:
        cells = (
            row.operation,
            " + ".join(row.kernels),
            f"{row.calls:,.1f}".removesuffix(".0"),
            f"{row.microseconds:,.1f}",
            f"{row.microseconds / self.microseconds:.1%}",
        )
        cost = row.cost
        if cost is None or row.of_limit is None:
            return (*cells, "", "", "", "")
        seconds = row.microseconds / 1e6
        is_bound_by_memory = cost.bytes / self.limits.read_bandwidth >= cost.flops / self.limits.flops
        rate = f"{cost.bytes / seconds / 1e12:.2f} TB/s" if is_bound_by_memory else _teraflops(cost, seconds)
        return (*cells, f"{cost.bytes / 1e6:,.1f}", f"{cost.flops / 1e9:,.1f}", rate, f"{row.of_limit:.0%}")


def _teraflops(cost: Cost, seconds: float) -> str:
    return f"{cost.flops / seconds / 1e12:,.0f} TFLOP/s"


def step_table(
    title: str,
    kernels: Sequence[Kernel],
    num_steps: int,
    config: ModelConfig,
    step: StepSize,
    limits: DeviceLimits,
    *,
    linear_nbytes: float = 2.0,
) -> StepTable:
    """The table of steps of one size.

    Args:
        title: which steps.
        kernels: all launches of the steps.
        num_steps: how many steps those are.
        config: of the model.
        step: the size of each.
        limits: of the device.
        linear_nbytes: bytes of a weight of a linear layer.
    """
    costs: dict[str, Cost] = {one.name: one.cost for one in step_costs(config, step, linear_nbytes=linear_nbytes)}
    order = linear_order(config)
    groups: dict[str, list[Kernel]] = {}
    kernels = sorted(kernels, key=lambda kernel: kernel.start)
    for name, kernel in zip(_operations(kernels, num_steps, order, config), kernels, strict=True):
        groups.setdefault(name, []).append(kernel)
    if LINEAR in groups:  # not told apart
        costs[LINEAR] = sum((costs[name] for name in dict.fromkeys(order)), Cost())
    rows = [_row(name, group, num_steps, costs.get(name), limits) for name, group in groups.items()]
    return StepTable(title, num_steps, limits, tuple(sorted(rows, key=lambda row: -row.microseconds)))


def _row(name: str, group: Sequence[Kernel], num_steps: int, cost: Cost | None, limits: DeviceLimits) -> OperationTime:
    times: dict[str, float] = {}
    for kernel in group:
        times[kernel.name] = times.get(kernel.name, 0.0) + kernel.microseconds
    at_limit = 0.0 if cost is None else max(cost.bytes / limits.read_bandwidth, cost.flops / limits.flops)
    names = tuple(sorted(times, key=lambda kernel: -times[kernel]))
    return OperationTime(name, names, len(group) / num_steps, sum(times.values()) / num_steps, cost, at_limit)


def _operations(kernels: Sequence[Kernel], num_steps: int, order: Sequence[str], config: ModelConfig) -> list[str]:
    """The operation of each kernel, given in the order of their starts."""
    names: list[str] = []
    for kernel in kernels:
        name = operation_of(kernel.name, has_experts=config.moe is not None)
        if name is None:
            name = names[-1] if names else kernel.name
        names.append(name)
    # A companion counts for the linear layer before it, but is none of the order.
    places = [
        index
        for index, kernel in enumerate(kernels)
        if names[index] == LINEAR and operation_of(kernel.name, has_experts=config.moe is not None) == LINEAR
    ]
    per_step = len(places) / num_steps
    expected = order if per_step == len(order) else order[:-1]  # a step of prompts may want no logits
    if per_step != len(expected):
        return names
    for number, index in enumerate(places):
        found = expected[number % len(expected)]
        names[index] = found
        if index + 1 < len(names) and names[index + 1] == LINEAR and index + 1 not in places:
            names[index + 1] = found
    return names


def operation_of(kernel: str, *, has_experts: bool) -> str | None:
    """The operation that a kernel belongs to by its name; None for one that ends what the kernel before it began."""
    if any(part in kernel for part in COMPANIONS):
        return None
    for operation, parts in PATTERNS:
        if any(part in kernel for part in parts):
            # Without experts, their kernels multiply block-scaled weights.
            return LINEAR if operation == "experts" and not has_experts else operation
    return "other"


def kernels_of_steps(trace: Mapping[str, Any], step_starts: Sequence[float]) -> list[list[Kernel]]:
    """The kernels that each step launched, from a timeline of torch's profiler.

    Args:
        trace: the timeline, as JSON.
        step_starts: when the host began each step, on the timeline's clock; a step lasts until the next one.
    """
    launches: dict[int, float] = {}
    for event in trace["traceEvents"]:
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {}):
            launches[event["args"]["correlation"]] = float(event["ts"])
    found: list[list[Kernel]] = [[] for _ in step_starts]
    for event in trace["traceEvents"]:
        if event.get("cat") != "kernel":
            continue
        launched = launches.get(event["args"].get("correlation"))
        step = -1 if launched is None else bisect_right(step_starts, launched) - 1
        if step >= 0:
            found[step].append(Kernel(event["name"], float(event["ts"]), float(event["dur"])))
    return found
