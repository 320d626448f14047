"""Where the time of one decoding step goes: every operation of the demo model's engine, and the host between steps.

    python -m benchmarks.cpu.steps
    python -m benchmarks.cpu.steps --model path/to/model.gguf --streams 1 --repeats 20

A step computes one token of each stream, 192 of whose tokens are cached: the middle of an answer of 128 tokens to a
prompt of 128. Operations are timed inside the native step, with the barrier after them; a line has those of all layers.
Nobody wants logits, so the head of one stream is read through its screen; beside it stands what it takes with logits.
The limit is what reading their weights (of attention: the cache) takes at the bandwidth of the same minute, or their
products at the int8 peak. The host's part is what is left of answers through `LLM`. Writes `results/cpu_steps.json`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.cpu.machine_limits import MachineLimits, measure_limits
from benchmarks.cpu.play_tokenmill import generate
from benchmarks.result_file import RESULTS, Row, print_rows, write_result
from tokenmill import LLM, KvCacheConfig
from tokenmill.builder.build import build
from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.engine.plan import Interruption
from tokenmill.engine.plan import Row as PlanRow
from tokenmill.ops.cpu.repetition import Repetition
from tokenmill.ops.cpu.threads import OpList, ThreadPool
from tokenmill.program.costs import OperationRow, StepSize, operation_rows, rows_by_layer_part
from tokenmill.program.package import EnginePackage
from tokenmill.runtime.cpu_program import CpuExecutor
from tokenmill.runtime.head_screen import MEASURED_STEPS
from tokenmill.runtime.program_executor import ProgramExecutor
from tokenmill.runtime.program_loading import StepLimits, load_executor

CONTEXT, INPUT, OUTPUT, BLOCK = 192, 128, 128, 32


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2:135m", help="the demo model's name or a GGUF file")
    parser.add_argument("--streams", default="1,16", help="numbers of streams, with commas")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_steps.json")
    options = parser.parse_args()
    path = resolve_model(options.model)
    streams = [int(count) for count in options.streams.split(",")]
    package = build(path, device="cpu", capture="dispatch", opt_level=1, max_num_tokens=2048, max_seq_len=1024)
    rows: list[Row] = []
    for count in streams:
        rows += step_rows(package, count, options.threads, options.repeats)
    cache = KvCacheConfig(max_tokens=320 * max(streams), enable_block_reuse=False)
    with LLM(path, backend="engine", device="cpu", num_threads=options.threads, kv_cache_config=cache,
             max_num_tokens=2048, max_batch_size=max(streams)) as llm:  # fmt: skip
        rows += [host_row(llm, count) for count in streams]
    print_rows(rows)
    write_result(options.output, "cpu_steps", rows)
    print(f"written to {options.output}")


def step_rows(package: EnginePackage, num_streams: int, num_threads: int, repeats: int) -> Iterator[Row]:
    """A row for each kind of operation, their sum, and the step without clock readings."""
    work = f"step of {num_streams} stream{'s' if num_streams > 1 else ''}"
    blocks = -(-CONTEXT // BLOCK)
    limits = StepLimits(
        max_batch_size=num_streams, max_num_tokens=max(num_streams, 2), max_seq_len=CONTEXT + BLOCK,
        num_blocks=num_streams * blocks + 1, tokens_per_block=BLOCK,
    )  # fmt: skip
    cache_dtype = getattr(torch, package.config.kv_cache_dtype)
    executor = load_executor(package, limits, cache_dtype, num_threads=num_threads)
    fill(executor, num_streams, blocks)
    spent: dict[str, list[float]] = {}
    whole, whole_head, machine = [], [], []
    head = package.program.operations[-1].name
    for _ in range(2 * MEASURED_STEPS):  # the screen of the head learns
        executor.run_steps(1, 1.0, Interruption())
    for repeat in range(repeats + 2):
        if repeat % 10 == 0:
            machine.append(measure_limits(num_threads))
        begin = time.perf_counter()
        executor.run_steps(1, 1.0, Interruption())
        whole.append(time.perf_counter() - begin)
        for name, seconds in executor.run_timed(with_logits=False).items():
            spent.setdefault(name, []).append(seconds)
        whole_head.append(executor.run_timed()[head])
    times = {name: statistics.median(values[2:]) * 1e6 for name, values in spent.items()}
    size = StepSize(
        num_tokens=num_streams, num_rows=num_streams, num_sequences=num_streams, context_len=CONTEXT,
        cache_nbytes=cache_dtype.itemsize,
    )  # fmt: skip
    found = MachineLimits.median(machine)
    yield Row(work, "memory read bandwidth", round(found.bandwidth / 1e9, 1), "GB/s")
    total_limit = 0.0
    screen = executor.screen if isinstance(executor, CpuExecutor) and num_streams == 1 else None
    operations = operation_rows(package.program, size, times)
    if screen is not None and screen.is_ready:
        cost = replace(operations[-1].cost, weight_bytes=screen.num_bytes)
        operations = (*operations[:-1], replace(operations[-1], kind="linear, its largest alone", cost=cost))
    for row in rows_by_layer_part(operations):
        limit = limit_of(row, found)
        total_limit += limit
        read = f", {memory_bytes(row) / 1e6:.1f} MB" if memory_bytes(row) > 1e5 else ""
        name = f"{row.count} x {row.name} ({row.kind}){read}"
        yield Row(work, name, round((row.microseconds or 0.0) / 1e3, 4), "ms", limit=round(limit, 4) or None)
    yield Row(work, f"{head} with logits", round(statistics.median(whole_head[2:]) * 1e3, 4), "ms")
    yield Row(work, "sum of the operations", round(sum(times.values()) / 1e3, 3), "ms", limit=round(total_limit, 3))
    yield Row(work, "the same step without clock readings", round(statistics.median(whole[2:]) * 1e3, 3), "ms")


def fill(executor: ProgramExecutor, num_streams: int, blocks: int) -> None:
    """The step's integers: random tokens, each stream with blocks of its own."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, 1000, (num_streams, CONTEXT))
    tables = 1 + generator.permutation(num_streams * blocks).reshape(num_streams, blocks).astype(np.int32)
    plan = [PlanRow(stream, CONTEXT - 1, 1, sample=True) for stream in range(num_streams)]
    executor.arrays.fill(plan, tokens, tables)


def memory_bytes(row: OperationRow) -> int:
    """What an operation cannot find in a cache: its weights, and keys and values."""
    return row.cost.bytes if row.kind == "attention" else row.cost.weight_bytes


def limit_of(row: OperationRow, machine: MachineLimits) -> float:
    """The least milliseconds."""
    arithmetic = row.cost.flops / machine.int8_ops if row.kind.startswith("linear") else 0.0
    return 1e3 * max(memory_bytes(row) / machine.bandwidth, arithmetic)


def host_row(llm: LLM, num_streams: int) -> Row:
    """Time for each step outside native code: scheduling, tokens to callers, requests that come and go."""
    seconds_of_calls: list[float] = []
    steps_of_calls: list[int] = []
    run, run_steps = ThreadPool.run, ThreadPool.run_steps

    def timed(self: ThreadPool, ops: OpList) -> None:
        begin = time.perf_counter()
        run(self, ops)
        seconds_of_calls.append(time.perf_counter() - begin)
        steps_of_calls.append(1)

    def timed_steps(self: ThreadPool, ops: OpList, repetition: Repetition) -> int:
        begin = time.perf_counter()
        steps_of_calls.append(run_steps(self, ops, repetition))
        seconds_of_calls.append(time.perf_counter() - begin)
        return steps_of_calls[-1]

    shares = []
    ThreadPool.run, ThreadPool.run_steps = timed, timed_steps  # type: ignore[method-assign]
    try:
        for seed in range(4):
            seconds_of_calls.clear()
            steps_of_calls.clear()
            seconds = generate(llm, seed, num_sequences=num_streams, input_len=INPUT, output_len=OUTPUT)
            shares.append((seconds - sum(seconds_of_calls)) / sum(steps_of_calls))
    finally:
        ThreadPool.run, ThreadPool.run_steps = run, run_steps  # type: ignore[method-assign]
    work = f"step of {num_streams} stream{'s' if num_streams > 1 else ''}"
    return Row(work, "the host, for each step", round(statistics.median(shares[1:]) * 1e3, 3), "ms")


if __name__ == "__main__":
    main()
