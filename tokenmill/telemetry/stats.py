"""`EngineStats`: a snapshot of an engine's counters and gauges. Reading one never changes or drains anything."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    kv_cache: KvCacheStats = field(default_factory=KvCacheStats)
