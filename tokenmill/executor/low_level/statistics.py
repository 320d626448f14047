"""`IterationStats` and `RequestStats`: the engine's records under TensorRT-LLM's names, and as its JSON."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from tokenmill.telemetry.stats import RequestProgress, RequestStage, RequestSteps, StepStats


class RequestStageName(StrEnum):
    """Where a request is."""

    QUEUED = "QUEUED"
    CONTEXT_IN_PROGRESS = "CONTEXT_IN_PROGRESS"
    GENERATION_IN_PROGRESS = "GENERATION_IN_PROGRESS"
    GENERATION_COMPLETE = "GENERATION_COMPLETE"


_STAGE_NAMES: dict[RequestStage, RequestStageName] = {
    "waiting": RequestStageName.QUEUED,
    "prefill": RequestStageName.CONTEXT_IN_PROGRESS,
    "decode": RequestStageName.GENERATION_IN_PROGRESS,
    "finished": RequestStageName.GENERATION_COMPLETE,
}


class _JsonRecord:
    """A dataclass that can write itself with camelCase names."""

    __slots__ = ()

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self, dict_factory=_camel_case))  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheIterationStats(_JsonRecord):
    """The paged cache after an iteration, in blocks. Counters run since the executor's start."""

    max_num_blocks: int
    free_num_blocks: int
    used_num_blocks: int
    tokens_per_block: int
    cached_num_blocks: int
    evicted_num_blocks: int
    cache_hit_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingStats(_JsonRecord):
    """What an iteration computed. Counts of requests count sequences.

    Args:
        num_scheduled_requests: those that it computed something for.
        num_context_requests, num_gen_requests: those of them that computed their prompt, and one new token.
        num_paused_requests: those that were preempted.
        num_ctx_tokens: prompt tokens computed.
        num_gen_tokens: tokens sampled.
    """

    num_scheduled_requests: int
    num_context_requests: int
    num_gen_requests: int
    num_paused_requests: int
    num_ctx_tokens: int
    num_gen_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationStats(_JsonRecord):
    """One iteration (a step of the engine).

    Args:
        timestamp: its end, ISO 8601 in UTC.
        iter: number of the iteration, from 0 on.
        iter_latency_ms: milliseconds from the plan to the results.
        num_new_active_requests: sequences that took a slot.
        num_active_requests: sequences that hold one after it.
        num_queued_requests: sequences that wait after it.
        num_completed_requests: requests that ended since the iteration before.
        max_num_active_requests: slots.
        kv_cache_stats, inflight_batching_stats: see there.
    """

    timestamp: str
    iter: int
    iter_latency_ms: float
    num_new_active_requests: int
    num_active_requests: int
    num_queued_requests: int
    num_completed_requests: int
    max_num_active_requests: int
    kv_cache_stats: KvCacheIterationStats
    inflight_batching_stats: BatchingStats

    @classmethod
    def of(cls, step: StepStats, max_num_active_requests: int) -> IterationStats:
        """From the engine's record."""
        cache = step.kv_cache
        return cls(
            timestamp=_timestamp(step.end_time),
            iter=step.step,
            iter_latency_ms=step.duration * 1e3,
            num_new_active_requests=step.num_admitted,
            num_active_requests=step.num_running,
            num_queued_requests=step.num_waiting,
            num_completed_requests=step.num_finished,
            max_num_active_requests=max_num_active_requests,
            kv_cache_stats=KvCacheIterationStats(
                max_num_blocks=cache.num_blocks,
                free_num_blocks=cache.num_free_blocks,
                used_num_blocks=cache.num_blocks - cache.num_free_blocks,
                tokens_per_block=cache.tokens_per_block,
                cached_num_blocks=cache.num_cached_blocks,
                evicted_num_blocks=cache.num_evicted_blocks,
                cache_hit_rate=cache.hit_rate,
            ),
            inflight_batching_stats=BatchingStats(
                num_scheduled_requests=step.num_prefills + step.num_decodes,
                num_context_requests=step.num_prefills,
                num_gen_requests=step.num_decodes,
                num_paused_requests=step.num_preemptions,
                num_ctx_tokens=step.num_prompt_tokens,
                num_gen_tokens=step.num_generated_tokens,
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats(_JsonRecord):
    """One request after one iteration.

    Args:
        id: the number that `enqueue_request` gave.
        stage: where it is.
        context_prefill_position: prompt tokens computed.
        num_generated_tokens: tokens sampled, over all its sequences.
        scheduled: the iteration computed something for it.
        paused: one of its sequences was preempted and waits to resume.
    """

    id: int
    stage: RequestStageName
    context_prefill_position: int
    num_generated_tokens: int
    scheduled: bool
    paused: bool

    @classmethod
    def of(cls, progress: RequestProgress) -> RequestStats:
        """From the engine's record."""
        return cls(
            id=progress.request_id,
            stage=_STAGE_NAMES[progress.stage],
            context_prefill_position=progress.num_prefilled_tokens,
            num_generated_tokens=progress.num_generated_tokens,
            scheduled=progress.is_scheduled,
            paused=progress.is_preempted,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatsPerIteration(_JsonRecord):
    """All requests after one iteration: open ones, and those that ended since the one before.

    Args:
        iter: number of the iteration, as in `IterationStats`.
        request_stats: one for each request, in order of arrival.
    """

    iter: int
    request_stats: list[RequestStats]

    @classmethod
    def of(cls, steps: RequestSteps) -> RequestStatsPerIteration:
        """From the engine's record."""
        return cls(iter=steps.step, request_stats=[RequestStats.of(progress) for progress in steps.requests])


def _timestamp(monotonic_time: float) -> str:
    """A moment of `time.monotonic` as the clock on the wall showed it."""
    return datetime.fromtimestamp(time.time() - (time.monotonic() - monotonic_time), UTC).isoformat()


def _camel_case(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {_camel(name): value for name, value in fields}


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join("MS" if word == "ms" else word.capitalize() for word in rest)
