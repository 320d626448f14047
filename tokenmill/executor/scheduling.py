"""`make_core`: the scheduler and the engine core that drive a runner, as the arguments say."""

from __future__ import annotations

from typing import Any

from tokenmill.config import LlmArgs
from tokenmill.engine.core import EngineCore
from tokenmill.engine.plan import RepeatingRunner, Runner
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.settings import SchedulerSettings
from tokenmill.engine.step_recorder import StepRecorder
from tokenmill.executor.description import EngineDescription
from tokenmill.kv_cache.manager import KvCacheManager


def make_core(args: LlmArgs, description: EngineDescription, runner: Runner[Any], *, overlap: bool) -> EngineCore:
    """The step loop around `runner`.

    Args:
        args: policies and records.
        description: limits and memory plan.
        runner: computes steps.
        overlap: whether the runner's device can compute while the host plans; the arguments may forbid it.
    """
    records = args.stats_config
    recorder = StepRecorder(records.iter_stats_max_iterations, records.request_stats_max_iterations)
    overlap = overlap and not args.disable_overlap_scheduler
    max_repeats = 1
    if isinstance(runner, RepeatingRunner) and not overlap and not recorder.is_on:  # records are of single steps
        max_repeats = runner.max_repeats
    return EngineCore(_make_scheduler(args, description, max_repeats), runner, recorder, overlap=overlap)


def _make_scheduler(args: LlmArgs, description: EngineDescription, max_repeats: int) -> Scheduler:
    kv_cache = KvCacheManager(
        description.memory.num_blocks,
        description.memory.tokens_per_block,
        enable_block_reuse=args.kv_cache_config.enable_block_reuse,
        enable_partial_reuse=args.kv_cache_config.enable_partial_reuse,
    )
    settings = SchedulerSettings(
        max_batch_size=description.max_batch_size,
        max_num_tokens=description.max_num_tokens,
        max_seq_len=description.max_seq_len,
        max_input_len=description.max_input_len,
        enable_chunked_prefill=args.enable_chunked_prefill,
        capacity_policy=args.scheduler_config.capacity_scheduler_policy,
        queue_policy=args.scheduler_config.waiting_queue_policy,
        max_repeats=max_repeats,
    )
    return Scheduler(settings, kv_cache)
