"""Llama-3.1-8B's shape with random weights on one GPU: latency of one stream, throughput of many, start time.

    python -m benchmarks.gpu.llama8b --work 128/128/1
    python -m benchmarks.gpu.llama8b --work 128/128/1 128/128/512 --deterministic
    python -m benchmarks.gpu.llama8b --work 128/128/1 128/128/2048 1000/1000/512 --quantization fp8 --profile 64

Work is input length / output length / requests. Prompts are random token ids, greedy, end token off, no prefix cache,
token ids in and out. Each work runs once unmeasured with an eighth of the requests
and short answers (kernels compile), then measured. With
`--profile ROWS` the kernels of decode steps of that many rows are listed; with `--trace` also where the time of the
measured steps went, on the device, between steps and on the host.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu.step_trace import DecodeWindow, StepTrace
from benchmarks.result_file import RESULTS, Row, print_rows, write_result
from tokenmill import LLM, KvCacheConfig, SamplingParams, SchedulerConfig
from tokenmill.config import CapacitySchedulerPolicy

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0, "hidden_act": "silu",
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False, "eos_token_id": 128009, "torch_dtype": "bfloat16",
}  # fmt: skip

GOALS = {
    ("tpot", "128/128/1", "bf16"): (5.4, {"vLLM 0.26": 6.47}, 4.9),
    ("tpot", "128/128/1", "fp8"): (3.1, {"vLLM 0.26": 4.30}, 2.6),
    ("ttft", "128/128/1", "bf16"): (9.0, {"vLLM 0.26": 16.3}, 5.0),
    ("ttft", "128/128/1", "fp8"): (7.0, {"vLLM 0.26": 13.3}, 3.0),
    ("throughput", "128/128/2048", "bf16"): (18000.0, {"vLLM 0.26": 13046.0}, 24000.0),
    ("throughput", "128/128/2048", "fp8"): (29000.0, {"vLLM 0.26": 16183.0, "TensorRT-LLM 1.0": 28312.0}, 40000.0),
    ("throughput", "1000/1000/512", "bf16"): (9000.0, {"vLLM 0.26": 7221.0}, 11000.0),
    ("throughput", "1000/1000/768", "fp8"): (15500.0, {"vLLM 0.26": 11089.0, "TensorRT-LLM 1.0": 15220.0}, 18000.0),
    ("throughput", "2048/128/512", "bf16"): (2400.0, {"vLLM 0.26": 1920.0}, 2700.0),
    ("throughput", "2048/128/512", "fp8"): (3700.0, {"vLLM 0.26": 3055.0, "TensorRT-LLM 1.0": 3450.0}, 4800.0),
    ("start", "", "bf16"): (20.0, {"vLLM 0.26": 95.0}, None),
    ("start", "", "fp8"): (20.0, {"vLLM 0.26": 95.0}, None),
}
"""(metric, work, weights) -> goal, what others reach, limit."""


@dataclass(frozen=True)
class Shape:
    """A model without its weights.

    Args:
        name: in the rows of the result.
        file: of the result.
        config: what its `config.json` says.
        goals: (metric, work, weights) -> goal, what others reach, limit.
    """

    name: str
    file: str
    config: dict[str, Any]
    goals: Mapping[tuple[str, str, str], tuple[float, dict[str, float], float | None]]


LLAMA = Shape("Llama 8B", "llama8b", LLAMA_8B, GOALS)

NUM_FIRST = 2
"""Requests that are not counted: a step of a new size runs launch by launch, and is captured the second time."""


def main() -> None:
    """Measure, print, write."""
    run(LLAMA, parse_arguments(__doc__))


def run(shape: Shape, options: argparse.Namespace) -> None:
    """Measure a shape, print, write."""
    weights = options.quantization or "bf16"
    name = f"{shape.file}_{'deterministic' if options.deterministic else weights}"
    output = options.output or RESULTS / f"{name}.json"

    def write(measured: list[Row]) -> None:
        write_result(output, name, measured, device=torch.cuda.get_device_name())

    if options.deterministic:
        rows = measure_both_modes(shape, options, weights, write)
    else:
        rows = measure_engine(shape, options, weights, write)
    print_rows(rows)
    write(rows)
    print("written to", output)


def measure_both_modes(
    shape: Shape, options: argparse.Namespace, weights: str, write: Callable[[list[Row]], None]
) -> list[Row]:
    """Two engines, one after the other: deterministic, then not. Without their starts, since the second one finds
    compiled kernels."""
    rows: list[Row] = []
    for options.deterministic in (True, False):
        extend = partial(with_works, rows, options.deterministic)
        rows = extend(measure_engine(shape, options, weights, lambda found, extend=extend: write(extend(found))))
    return rows


def with_works(rows: list[Row], deterministic: bool, found: list[Row]) -> list[Row]:
    """The rows, and those of works that were found in a mode."""
    works = [one for one in found if one.work.count("/") > 1]
    if deterministic:
        works = [replace(one, metric=f"{one.metric}, deterministic", goal=None) for one in works]
    return rows + works


def measure_engine(
    shape: Shape, options: argparse.Namespace, weights: str, write: Callable[[list[Row]], None] | None = None
) -> list[Row]:
    """Start an engine, measure all works with it, and end it; `write` after each work, since a run may be cut off."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape.config))
        started = time.perf_counter()
        llm = make_llm(Path(folder), options)
        generate(llm, [[1] * 16], 1)
        rows = [row(shape, "start", "", weights, "engine start to first token", time.perf_counter() - started, "s")]
    with llm:
        print(f"start {rows[0].value:.2f} s, cache: {llm.description.memory.cache_tokens:,} tokens", flush=True)
        trace = trace_steps(llm) if options.trace else None
        for work in options.work:
            measured = measure(llm, shape, work, weights, options.repeats, trace)
            print_rows(measured)
            rows += measured
            if write is not None:
                write(rows)
        for num_rows in options.profile:
            profile_decode(llm, num_rows)
    return rows


def parse_arguments(description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=["128/128/1"], help="input/output/requests")
    parser.add_argument("--quantization", choices=["fp8"], default=None)
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--max-batch-size", type=int, default=1024)
    parser.add_argument("--max-num-tokens", type=int, default=8192)
    parser.add_argument("--max-seq-len", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of one-request work; the median counts")
    parser.add_argument(
        "--profile", type=int, nargs="*", default=[], help="list the kernels of a decode step of that many rows"
    )
    parser.add_argument("--trace", action="store_true", help="print where the time of the measured steps went")
    parser.add_argument("--policy", choices=list(CapacitySchedulerPolicy), default="GUARANTEED_NO_EVICT")
    parser.add_argument("--cache-fraction", type=float, default=0.9, help="of the free memory, for the cache")
    parser.add_argument("--deterministic", action="store_true", help="measure with the deterministic mode and without")
    parser.add_argument("--output", type=Path, default=None)
    return parser.parse_args()


def make_llm(folder: Path, options: argparse.Namespace) -> LLM:
    """An engine with random weights made on the GPU."""
    extra = {} if options.quantization is None else {"quantization": options.quantization}
    return LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_batch_size=options.max_batch_size,
        max_num_tokens=options.max_num_tokens,
        max_seq_len=options.max_seq_len,
        kv_cache_config=KvCacheConfig(
            enable_block_reuse=False, dtype=options.kv_dtype, free_gpu_memory_fraction=options.cache_fraction
        ),
        scheduler_config=SchedulerConfig(capacity_scheduler_policy=options.policy),
        deterministic=options.deterministic,
        **extra,
    )


def trace_steps(llm: LLM) -> StepTrace:
    """Put a trace between the engine and its runner."""
    engine = llm._executor._engine  # type: ignore[attr-defined]
    engine.runner = StepTrace(engine.runner)
    trace: StepTrace = engine.runner
    return trace


def measure(llm: LLM, shape: Shape, work: str, weights: str, repeats: int, trace: StepTrace | None) -> list[Row]:
    """Rows of one work."""
    input_len, output_len, num_requests = (int(part) for part in work.split("/"))
    if num_requests == 1:
        return measure_one_stream(llm, shape, work, weights, repeats)
    generate(llm, prompts(max(64, num_requests // 8), input_len, seed=1), min(output_len, 16))
    token_ids = prompts(num_requests, input_len, seed=2)
    if trace is not None:
        trace.steps.clear()
    started = time.perf_counter()
    num_tokens = generate(llm, token_ids, output_len)
    seconds = time.perf_counter() - started
    assert num_tokens == num_requests * output_len
    if trace is not None:
        trace.report(seconds)
    return [row(shape, "throughput", work, weights, "output tokens/s", num_tokens / seconds, "tokens/s")]


def measure_one_stream(llm: LLM, shape: Shape, work: str, weights: str, repeats: int) -> list[Row]:
    """Time to first token and time per output token of one request at a time."""
    input_len, output_len, _ = (int(part) for part in work.split("/"))
    first, per_token = [], []
    for repeat in range(NUM_FIRST + repeats):
        params = SamplingParams(max_tokens=output_len, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        result = llm.generate_async(prompts(1, input_len, seed=repeat)[0], params, streaming=True)
        next(result)
        first_token = time.perf_counter()
        output = result.result()
        ended = time.perf_counter()
        assert output.outputs[0].length == output_len
        if repeat >= NUM_FIRST:
            first.append((first_token - started) * 1e3)
            per_token.append((ended - first_token) / (output_len - 1) * 1e3)
    return [
        row(shape, "tpot", work, weights, "time per output token", statistics.median(per_token), "ms"),
        row(shape, "ttft", work, weights, "time to first token", statistics.median(first), "ms"),
    ]


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids, below the special tokens."""
    generator = random.Random(seed)
    return [[generator.randrange(100000) for _ in range(length)] for _ in range(count)]


def generate(llm: LLM, token_ids: Sequence[list[int]], output_len: int) -> int:
    """Run all prompts; the number of tokens that came out."""
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, detokenize=False)
    outputs: list[Any] = llm.generate(list(token_ids), params, use_tqdm=False)
    return sum(output.outputs[0].length for output in outputs)


def profile_decode(llm: LLM, num_rows: int) -> None:
    """Print where the time of decode steps of `num_rows` rows goes, by kernel."""
    engine = llm._executor._engine  # type: ignore[attr-defined]
    runner = engine.runner
    engine.runner = window = DecodeWindow(runner, num_rows)
    generate(llm, prompts(num_rows, 128, seed=3), 96)
    engine.runner = runner
    window.report()
    window.table(llm).print(Console(width=170))


def row(shape: Shape, metric: str, work: str, weights: str, name: str, value: float, unit: str) -> Row:
    """A row with its goal, peers and limit."""
    goal, peer, limit = shape.goals.get((metric, work, weights), (None, None, None))
    is_upper_goal = metric != "throughput"
    return Row(f"{shape.name} {weights} {work}".strip(), name, value, unit, goal, peer, limit, is_upper_goal)


if __name__ == "__main__":
    main()
