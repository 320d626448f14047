"""Speed of the demo model on a CPU: one stream, sixteen at a time, prefill. Writes `results/cpu_baseline.json`.

    python benchmarks/cpu_baseline.py
    python benchmarks/cpu_baseline.py --model path/to/SmolLM2.gguf --repeats 5 --output /tmp/result.json

Every number is the median of the repeats, each on fresh random prompts, with the prefix cache off. Beside it stand the
goal, what other systems reach on the machine that the goal was set on (2 cores of an AMD EPYC), and the limit that this
machine sets: how fast it reads the weights once for each step, or multiplies them, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from tokenmill import LLM, KvCacheConfig
from tokenmill.bench.machine import describe_machine, describe_versions
from tokenmill.bench.run import run_benchmark
from tokenmill.bench.workload import synthetic_requests

FOLDER = Path(__file__).resolve().parent
BANDWIDTH_BYTES = 512 * 2**20
MATMUL_SIZE = 2048


@dataclass(frozen=True)
class Row:
    """One result.

    Args:
        work: what was run.
        metric, value, unit: what was measured.
        goal: not to fall below; None: none was set.
        peer: what other systems reach, by name.
        limit: what the machine allows; None: does not apply.
    """

    work: str
    metric: str
    value: float
    unit: str
    goal: float | None = None
    peer: dict[str, float] | None = None
    limit: float | None = None


@dataclass(frozen=True)
class MachineLimits:
    """What this machine can do at best, measured.

    Args:
        bandwidth: bytes read from memory a second.
        flops: bfloat16 operations a second in a large matrix multiplication.
    """

    bandwidth: float
    flops: float

    def tokens_per_second(self, llm: LLM, *, tokens_per_step: int, context: int) -> float:
        """Most tokens a second when every step computes `tokens_per_step` tokens, each after `context` cached ones.

        A step reads all weights once and the cache of its sequences, and multiplies every weight with every token.
        """
        model = llm.description.model
        num_parameters = model.num_parameters()
        num_bytes = 2 * num_parameters + tokens_per_step * context * model.kv_bytes_per_token(2)
        seconds = max(num_bytes / self.bandwidth, 2 * num_parameters * tokens_per_step / self.flops)
        return tokens_per_step / seconds


def main() -> None:
    """Measure, print, write."""
    options = parse_arguments()
    if os.getloadavg()[0] > 0.5 * torch.get_num_threads():
        print(
            f"warning: this machine is busy (load {os.getloadavg()[0]:.1f}); the numbers will be low", file=sys.stderr
        )
    limits = measure_limits()
    with LLM(options.model, dtype="bfloat16", device="cpu", kv_cache_config=cache_config()) as llm:
        rows = measure(llm, limits, options.repeats)
    machine = describe_machine()
    result = {
        "benchmark": "cpu_baseline",
        "device": f"{machine.cpu}, {torch.get_num_threads()} threads",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
        "versions": describe_versions(),
        "rows": [asdict(row) for row in rows],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_rows(rows)
    print(f"written to {options.output}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Speed of the demo model on a CPU.")
    parser.add_argument("--model", default="smollm2:135m", help="the demo model's name or file")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each; the median counts")
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "cpu_baseline.json")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


def cache_config() -> KvCacheConfig:
    """Room for sixteen sequences of 256 tokens, and no reuse between repeats."""
    return KvCacheConfig(max_tokens=8192, enable_block_reuse=False)


def measure(llm: LLM, limits: MachineLimits, repeats: int) -> list[Row]:
    """All rows."""
    single = [run(llm, 1, 1, 128, 128, seed) for seed in range(repeats)]
    batch = [run(llm, 16, 16, 128, 128, seed) for seed in range(repeats)]
    prefill = [run(llm, 1, 1, 1024, 1, seed) for seed in range(repeats)]

    def median(reports: list[dict[str, float]], name: str) -> float:
        return round(statistics.median(report[name] for report in reports), 2)

    one, many = (limits.tokens_per_second(llm, tokens_per_step=count, context=192) for count in (1, 16))
    # Only the last prompt position needs the output head, so this limit is a little low.
    prompt = limits.tokens_per_second(llm, tokens_per_step=1024, context=0)
    return [
        Row("1 stream, 128 in, 128 out", "output throughput", median(single, "output"), "tokens/s", 30,
            {"vLLM CPU build": 39, "transformers": 13}, round(one, 1)),
        Row("1 stream, 128 in, 128 out", "output speed after the first token", median(single, "speed"), "tokens/s",
            limit=round(one, 1)),
        Row("16 streams, 128 in, 128 out", "output throughput", median(batch, "output"), "tokens/s", 200,
            {"vLLM CPU build": 286, "transformers": 84}, round(many, 1)),
        Row("prefill of 1024 tokens", "prompt throughput", median(prefill, "prompt"), "tokens/s", 900,
            {"vLLM CPU build": 1029, "transformers": 600}, round(prompt, 1)),
        Row("this machine", "memory read bandwidth", round(limits.bandwidth / 1e9, 1), "GB/s"),
        Row("this machine", "bfloat16 matrix multiplication", round(limits.flops / 1e9, 1), "GFLOP/s"),
    ]  # fmt: skip


def run(llm: LLM, num_requests: int, concurrency: int, input_len: int, output_len: int, seed: int) -> dict[str, float]:
    """One measurement, after a warm-up of the same shape."""
    requests = synthetic_requests(
        num_requests=2 * num_requests,
        input_len=input_len,
        output_len=output_len,
        vocab_size=llm.description.model.vocab_size,
        special_token_ids=() if llm.tokenizer is None else llm.tokenizer.all_special_ids,
        seed=seed,
    )
    warmup, measured = requests[:num_requests], requests[num_requests:]
    report = run_benchmark(llm, measured, warmup=warmup, concurrency=concurrency)
    if report.failed:
        raise SystemExit(f"a request failed: {report.failed[0].error}")
    results = report.results()
    speed = results["output_speed_per_user"]
    return {
        "output": results["output_throughput"],
        "speed": speed["average"] if speed else 0.0,
        "prompt": results["num_prompt_tokens"] / (results["ttft_ms"]["average"] / 1e3),
    }


def measure_limits() -> MachineLimits:
    """Read a tensor larger than the caches; multiply two large matrices. The best of several tries each."""
    data = torch.ones(BANDWIDTH_BYTES // 4)
    matrix = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16)
    return MachineLimits(
        bandwidth=BANDWIDTH_BYTES / best_time(data.sum, 10),
        flops=2 * MATMUL_SIZE**3 / best_time(lambda: matrix @ matrix, 10),
    )


def best_time(function: Callable[[], object], tries: int) -> float:
    """Seconds of the fastest of `tries` calls."""
    times = []
    for _ in range(tries):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def commit() -> str:
    """The source tree's commit, with `-dirty` if it was changed; `unknown` outside a repository."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def print_rows(rows: list[Row]) -> None:
    """The results as a table."""
    for row in rows:
        notes = []
        if row.goal is not None:
            notes.append(f"goal {row.goal:g} {'reached' if row.value >= row.goal else 'MISSED'}")
        if row.peer:
            notes += [f"{name} {value:g}" for name, value in row.peer.items()]
        if row.limit is not None:
            notes.append(f"{row.value / row.limit:.0%} of the limit {row.limit:g}")
        print(f"{row.work:28} {row.metric:36} {row.value:10,.1f} {row.unit:9} {', '.join(notes)}")


if __name__ == "__main__":
    main()
