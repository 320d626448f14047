"""What does it cost to run the engine in a process of its own? Throughput and time to the first token, both ways.

    python -m benchmarks.ipc_overhead
    python -m benchmarks.ipc_overhead --model path/to/SmolLM2.gguf --rounds 3 --output /tmp/ipc.json

In process and in a worker process take turns (A B A B ...), so that what else the machine does hits both alike. Each
turn starts anew: a fresh interpreter runs a script from its first line to its first token; then, in this process, come
sixteen requests at a time, the first sixteen as a warm-up. The ratio is the median over the rounds of the ratios within
a round. Writes `results/ipc_overhead.json`; fails if a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.result_file import RESULTS, ROOT, Row, print_rows, write_result
from tokenmill import LLM, KvCacheConfig
from tokenmill.bench.run import run_benchmark
from tokenmill.bench.workload import synthetic_requests

CONCURRENCY = 16
MAX_OVERHEAD = 0.03
"""Share of the throughput that a worker process may cost."""
MAX_LATER_START = 1.0
"""Seconds by which the first token may come later."""
_SCRIPT = """
import sys
from tokenmill import LLM, KvCacheConfig, SamplingParams

arguments = {"device": "cpu", "num_replicas": int(sys.argv[2]), "kv_cache_config": KvCacheConfig(max_tokens=8192)}
with LLM(sys.argv[1], **arguments) as llm:
    result = llm.generate_async("Hello", SamplingParams(max_tokens=2, ignore_eos=True), streaming=True)
    next(result)
    print("token", flush=True)
    result.result()
"""
IN_PROCESS, WORKER = "in process", "worker process"


@dataclass(frozen=True)
class Turn:
    """One measurement of one of the two.

    Args:
        throughput: output tokens a second.
        first_token: seconds from the start of Python to the first token.
        time_per_output_token: of one request among the sixteen, mean, milliseconds.
    """

    throughput: float
    first_token: float
    time_per_output_token: float


def main() -> None:
    """Measure, print, write."""
    options = parse_arguments()
    cores = os.cpu_count() or 1
    if os.getloadavg()[0] > 0.5 * cores:
        print(f"warning: this machine is busy (load {os.getloadavg()[0]:.1f})", file=sys.stderr)
    turns: dict[str, list[Turn]] = {IN_PROCESS: [], WORKER: []}
    measure(options, WORKER, 0)  # fills the caches of the file system for both
    for index in range(options.rounds):
        for mode in (IN_PROCESS, WORKER) if index % 2 == 0 else (WORKER, IN_PROCESS):
            turn = measure(options, mode, index + 1)
            turns[mode].append(turn)
            print(f"round {index + 1} {mode:15} {turn.throughput:8.1f} tokens/s  first token {turn.first_token:.2f} s")
    rows = make_rows(turns, f"{CONCURRENCY} streams, {options.input_len} in, {options.output_len} out")
    print_rows(rows)
    write_result(options.output, "ipc_overhead", rows)
    print(f"written to {options.output}")
    if not all(row.is_reached for row in rows):
        raise SystemExit(1)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ipc_overhead", description="Cost of worker processes.")
    parser.add_argument("--model", default="smollm2:135m", help="the model's name or file")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; medians count")
    parser.add_argument("--requests", type=int, default=32, help="of one turn, sixteen at a time")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS / "ipc_overhead.json")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.requests, options.input_len, options.output_len) < 1:
        parser.error("counts must be at least 1")
    return options


def measure(options: argparse.Namespace, mode: str, seed: int) -> Turn:
    """One turn."""
    arguments: dict[str, Any] = {
        "device": "cpu",
        "kv_cache_config": KvCacheConfig(max_tokens=CONCURRENCY * 512, enable_block_reuse=False),
        "num_replicas": 0 if mode == IN_PROCESS else 1,
    }
    first_token = time_to_first_token(options.model, arguments["num_replicas"])
    with LLM(options.model, **arguments) as llm:
        requests = synthetic_requests(
            num_requests=CONCURRENCY + options.requests,
            input_len=options.input_len,
            output_len=options.output_len,
            vocab_size=llm.description.model.vocab_size,
            special_token_ids=() if llm.tokenizer is None else llm.tokenizer.all_special_ids,
            seed=seed,
        )
        warm_up, measured = requests[:CONCURRENCY], requests[CONCURRENCY:]
        report = run_benchmark(llm, measured, warmup=warm_up, concurrency=CONCURRENCY)
    if report.failed:
        raise SystemExit(f"a request failed: {report.failed[0].error}")
    results = report.results()
    per_token = results["tpot_ms"]
    return Turn(results["output_throughput"], first_token, per_token["average"] if per_token else 0.0)


def time_to_first_token(model: str, num_replicas: int) -> float:
    """Seconds from the start of a Python interpreter that runs `_SCRIPT` until it has a token."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, model, str(num_replicas)], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - started
    if line != b"token\n" or process.returncode:
        raise SystemExit(f"the script to the first token failed with {process.returncode}")
    return seconds


def make_rows(turns: dict[str, list[Turn]], work: str) -> list[Row]:
    """Medians of both, and what the one costs over the other."""

    def median(mode: str, name: str) -> float:
        return round(statistics.median(getattr(turn, name) for turn in turns[mode]), 3)

    pairs = list(zip(turns[IN_PROCESS], turns[WORKER], strict=True))
    ratio = statistics.median(worker.throughput / own.throughput for own, worker in pairs)
    later = statistics.median(worker.first_token - own.first_token for own, worker in pairs)
    rows = []
    for mode in (IN_PROCESS, WORKER):
        rows.append(Row(work, f"output throughput, {mode}", median(mode, "throughput"), "tokens/s"))
        rows.append(Row(work, f"time per output token, {mode}", median(mode, "time_per_output_token"), "ms"))
    rows.append(Row(work, "throughput, worker process over in process", round(ratio, 4), "", 1.0 - MAX_OVERHEAD,
                    is_upper_goal=False))  # fmt: skip
    for mode in (IN_PROCESS, WORKER):
        rows.append(Row("start to first token", mode, median(mode, "first_token"), "s"))
    rows.append(Row("start to first token", "worker process later by", round(later, 3), "s", MAX_LATER_START))
    return rows


if __name__ == "__main__":
    main()
