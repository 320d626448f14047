"""`EngineStats`: a snapshot of an engine's counters and gauges. Reading one never changes or drains anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

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
class EngineStats:
    """One engine at one moment. Counters run since the engine's start.

    Args:
        num_running: sequences that hold a slot.
        num_waiting: sequences in the waiting queue.
        num_steps: steps run.
        num_prompt_tokens: prompt tokens computed (cached ones not counted).
        num_generated_tokens: tokens sampled.
        num_preemptions: times a running sequence was put back to the queue.
        num_finished: requests that ended, by outcome (`stop`, `length`, `cancelled`, or an error's code).
        last_step_time: `time.monotonic()` at the end of the last step, seconds; None before the first.
        recent_steps: the last steps, oldest first; as many as `LlmArgs.iter_stats_max_iterations` keeps.
        recent_requests: the requests in the last steps; as many as `LlmArgs.request_stats_max_iterations` keeps.
        kv_cache: the paged cache.
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
