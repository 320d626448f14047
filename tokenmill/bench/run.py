"""One benchmark run: warm up, measure, report. Called by the command line and by the scripts in `benchmarks/`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tokenmill.bench.client import run_requests
from tokenmill.bench.machine import describe_machine, describe_versions
from tokenmill.bench.report import BenchmarkReport, RunDescription
from tokenmill.bench.workload import BenchmarkRequest

if TYPE_CHECKING:
    from tokenmill.llm import LLM


def run_benchmark(
    llm: LLM,
    requests: Sequence[BenchmarkRequest],
    *,
    kind: str = "throughput",
    warmup: Sequence[BenchmarkRequest] = (),
    concurrency: int | None = None,
    workload: dict[str, Any] | None = None,
    command: str = "",
    on_finished: Callable[[], None] | None = None,
) -> BenchmarkReport:
    """Send `warmup`, then measure `requests`.

    Args:
        kind: name of the benchmark in the report.
        warmup: sent first, not measured.
        concurrency: most requests under way at the same time; None: no limit.
        workload: described in the report.
        command: named in the report.
        on_finished: called after each measured request.

    Raises:
        UserError: an argument is out of range. Requests that fail are in the report.
    """
    if warmup:
        asyncio.run(run_requests(llm, warmup, concurrency=concurrency))
    before = llm.stats()
    records = asyncio.run(run_requests(llm, requests, concurrency=concurrency, on_finished=on_finished))
    after = llm.stats()
    description = RunDescription(
        kind=kind,
        model=str(llm.args.model),
        machine=describe_machine(),
        versions=describe_versions(),
        configuration=describe_configuration(llm),
        workload=dict(workload or {}),
        command=command,
    )
    return BenchmarkReport.of(description, records, before, after)


def describe_configuration(llm: LLM) -> dict[str, Any]:
    """What the engine runs with."""
    args, running = llm.args, llm.description
    runs_natively = running.backend == "engine" and running.device == "cpu"  # torch has nearly nothing to do with it
    num_cores = describe_machine().num_cores
    return {
        "backend": running.backend,
        **({} if runs_natively else {"attn_backend": running.attn_backend}),
        "quantization": args.quantization,
        "dtype": running.dtype,
        "device": running.device,
        "kv_cache_dtype": running.cache_dtype,
        "load_format": args.load_format,
        "max_batch_size": args.max_batch_size,
        "max_num_tokens": running.max_num_tokens,
        "max_seq_len": running.max_seq_len,
        "enable_chunked_prefill": args.enable_chunked_prefill,
        "enable_block_reuse": args.kv_cache_config.enable_block_reuse,
        "kv_cache_tokens": running.memory.cache_tokens,
        "capacity_scheduler_policy": str(args.scheduler_config.capacity_scheduler_policy),
        "num_threads": args.num_threads or num_cores if runs_natively else torch.get_num_threads(),
    }
