"""`EngineStats`: a snapshot of an engine's counters and gauges. Reading one never changes or drains anything.

`IterationStats` is the record of one step; those are handed out once, by `IterationResultQueue`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal, TypeAlias, TypeVar

RequestStage: TypeAlias = Literal["waiting", "prefill", "decode", "finished"]
"""Where a request is: not started, computing its prompt, generating, or ended in the step that is recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestProgress:
    """One request at the end of one step.

    Args:
        request_id: whose.
        stage: see `RequestStage`.
        num_prefilled_tokens: prompt tokens whose keys and values are in the cache.
        num_generated_tokens: tokens sampled, over all its sequences.
        is_scheduled: the step computed something for it.
        is_preempted: one of its sequences lost its blocks and waits to resume.
    """

    request_id: int
    stage: RequestStage
    num_prefilled_tokens: int
    num_generated_tokens: int
    is_scheduled: bool
    is_preempted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSteps:
    """All requests in the engine at the end of one step.

    Args:
        step: number of the step, as in `StepStats`.
        end_time: `time.monotonic()`, seconds.
        requests: those that are open, and those that ended since the step before.
    """

    step: int
    end_time: float
    requests: tuple[RequestProgress, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one step did.

    Args:
        step: number of the step, from 0 on.
        end_time: `time.monotonic()` when its results were taken in, seconds.
        duration: from the plan to the results, seconds. Overlapped steps overlap.
        num_running, num_waiting: sequences with a slot and in the waiting queue, after it.
        num_admitted: sequences that took a slot, resumed ones included.
        num_prefills, num_decodes: sequences that computed prompt tokens (or, resumed, earlier ones), and one new token.
        num_prompt_tokens: prompt tokens computed.
        num_generated_tokens: tokens sampled.
        num_preemptions, num_finished: sequences preempted, and requests that ended, since the step before.
        kv_cache: the paged cache after it.
    """

    step: int
    end_time: float
    duration: float
    num_running: int
    num_waiting: int
    num_admitted: int
    num_prefills: int
    num_decodes: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    num_finished: int
    kv_cache: KvCacheStats


@dataclass(frozen=True, slots=True)
class KvCacheStats:
    """The paged cache, in blocks and tokens.

    Args:
        num_blocks: usable blocks.
        num_free_blocks: blocks that can be given out now, cached but unused ones included.
        num_cached_blocks: blocks in the prefix tree.
        tokens_per_block: tokens in one block.
        num_queried_tokens: prompt tokens looked up in the prefix tree, since start.
        num_hit_tokens: those of them that were found, since start.
        num_evicted_blocks: cached blocks given up for new work, since start.
    """

    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    tokens_per_block: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_evicted_blocks: int = 0

    @property
    def usage(self) -> float:
        """Share of blocks that running sequences hold, 0 to 1."""
        return 1.0 - self.num_free_blocks / self.num_blocks if self.num_blocks else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of looked-up prompt tokens that were found, 0 to 1."""
        return self.num_hit_tokens / self.num_queried_tokens if self.num_queried_tokens else 0.0


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """The worker processes of an executor; all 0 when the engine runs in the caller's process.

    Args:
        num_replicas: worker processes that there should be.
        num_ready: those that can take requests now. Fewer than `num_replicas`: the executor is degraded.
        num_deaths: times a process (worker or postprocessing worker) ended unasked, since start.
        num_restarts: times one was started again, since start.
        num_stalls: times one was killed because it made no progress, since start.
        num_retries: times a request was tried again because its process died, since start.
    """

    num_replicas: int = 0
    num_ready: int = 0
    num_deaths: int = 0
    num_restarts: int = 0
    num_stalls: int = 0
    num_retries: int = 0


@dataclass(frozen=True, slots=True)
class IterationStats:
    """One step of one engine.

    Args:
        replica: the worker's number; 0 in the caller's process.
        step: number of the step, from 1 on; starts anew with a restarted worker.
        end_time: `time.monotonic()` when it ended, seconds.
        duration: seconds.
        num_running: sequences that held a slot at its end.
        num_waiting: sequences in the waiting queue at its end.
        num_prompt_tokens: prompt tokens that it computed.
        num_generated_tokens: tokens that it sampled.
        num_preemptions: sequences that it put back to the queue.
        num_free_blocks: cache blocks that could be given out at its end.
    """

    replica: int
    step: int
    end_time: float
    duration: float
    num_running: int
    num_waiting: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    num_free_blocks: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One engine, or all replicas of an executor together, at one moment. Counters run since the start.

    Args:
        num_running: sequences that hold a slot.
        num_waiting: sequences in the waiting queue.
        num_steps: steps run.
        num_prompt_tokens: prompt tokens computed (cached ones not counted).
        num_generated_tokens: tokens sampled.
        num_preemptions: times a running sequence was put back to the queue.
        num_finished: requests that ended, by outcome (`stop`, `length`, `cancelled`, or an error's code).
        last_step_time: `time.monotonic()` at the end of the last step, seconds; None before the first.
        recent_steps: the last steps, oldest first; as many as `StatsConfig.iter_stats_max_iterations`.
        recent_requests: the requests in the last steps; as many as `StatsConfig.request_stats_max_iterations`.
        kv_cache: the paged cache.
        num_rejected: requests refused because the queue was full.
        workers: the worker processes.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_finished: dict[str, int] = field(default_factory=dict)
    last_step_time: float | None = None
    recent_steps: tuple[StepStats, ...] = ()
    recent_requests: tuple[RequestSteps, ...] = ()
    kv_cache: KvCacheStats = field(default_factory=KvCacheStats)
    num_rejected: int = 0
    workers: WorkerStats = field(default_factory=WorkerStats)


def merge_stats(parts: Iterable[EngineStats]) -> EngineStats:
    """Several engines as one: sums, the latest step, and records of steps in the order of their ends."""
    parts = list(parts)
    num_finished: dict[str, int] = {}
    for part in parts:
        for outcome, count in part.num_finished.items():
            num_finished[outcome] = num_finished.get(outcome, 0) + count
    caches = [part.kv_cache for part in parts]
    return EngineStats(
        num_running=sum(part.num_running for part in parts),
        num_waiting=sum(part.num_waiting for part in parts),
        num_steps=sum(part.num_steps for part in parts),
        num_prompt_tokens=sum(part.num_prompt_tokens for part in parts),
        num_generated_tokens=sum(part.num_generated_tokens for part in parts),
        num_preemptions=sum(part.num_preemptions for part in parts),
        num_finished=num_finished,
        last_step_time=max((part.last_step_time for part in parts if part.last_step_time is not None), default=None),
        recent_steps=_by_end_time(part.recent_steps for part in parts),
        recent_requests=_by_end_time(part.recent_requests for part in parts),
        kv_cache=KvCacheStats(
            num_blocks=sum(cache.num_blocks for cache in caches),
            num_free_blocks=sum(cache.num_free_blocks for cache in caches),
            num_cached_blocks=sum(cache.num_cached_blocks for cache in caches),
            tokens_per_block=max((cache.tokens_per_block for cache in caches), default=0),
            num_queried_tokens=sum(cache.num_queried_tokens for cache in caches),
            num_hit_tokens=sum(cache.num_hit_tokens for cache in caches),
            num_evicted_blocks=sum(cache.num_evicted_blocks for cache in caches),
        ),
        num_rejected=sum(part.num_rejected for part in parts),
    )


_Record = TypeVar("_Record", StepStats, RequestSteps)


def _by_end_time(records: Iterable[tuple[_Record, ...]]) -> tuple[_Record, ...]:
    return tuple(sorted(chain.from_iterable(records), key=lambda record: record.end_time))
