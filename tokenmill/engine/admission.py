"""`Admission`: which waiting sequences join the running ones, and with which blocks.

The scheduler calls `admit_waiting` once a step, after the running sequences have their rows. Policies decide; this file
asks them, asks the cache for blocks, and moves sequences from the queue to slots.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenmill.engine import policies
from tokenmill.engine.placement import Placement
from tokenmill.engine.plan_draft import PlanDraft
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.settings import SchedulerSettings
from tokenmill.kv_cache.manager import KvCacheManager, PrefixGrant


class Admission:
    """From the waiting queue to slots.

    Args:
        settings: limits and policies.
        kv: where blocks come from.
        placement: the queue and the slots.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self, settings: SchedulerSettings, kv: KvCacheManager, placement: Placement, clock: Callable[[], float]
    ) -> None:
        self._settings = settings
        self._kv = kv
        self._placement = placement
        self._clock = clock
        self._batch_is_closed = False
        self._blocked_head: tuple[int, int] | None = None

    def admit_waiting(self, draft: PlanDraft) -> None:
        """Admit from the head of the queue while slots, tokens and blocks last. Nobody overtakes the head.

        A static batch is closed by the first admission round that ends for another reason than lack of tokens.
        """
        placement, policy = self._placement, self._settings.capacity_policy
        if not placement.running:
            self._batch_is_closed = False
        num_promised = self._num_promised() if placement.waiting and placement.free_slots else 0
        while placement.waiting and draft.num_tokens_left:
            sequence = placement.waiting.head
            may_join = policies.may_join(policy, self._batch_is_closed, sequence)
            if not (placement.free_slots and may_join and sequence.num_tokens_in_flight == 0):
                break
            grant = self._find_room(sequence, draft, num_promised)
            if grant is None:
                break
            self._admit(sequence, grant, draft)
            num_promised += self._num_growth(sequence, len(grant.block_ids))
        if placement.running and (not placement.waiting or draft.num_tokens_left):
            self._batch_is_closed = True

    def _find_room(self, sequence: Sequence, draft: PlanDraft, num_promised: int) -> PrefixGrant | None:
        """Blocks for the sequence at the head of the queue, or None if it must wait for others to leave."""
        attempt = (sequence.id, self._kv.num_releases)
        if self._placement.running and attempt == self._blocked_head:
            return None
        grant = self._request_blocks(sequence, draft, num_promised)
        while grant is None and not self._placement.running and self._placement.drop_held_prompt():
            grant = self._request_blocks(sequence, draft, num_promised)
        assert grant is not None or self._placement.running, f"sequence {sequence.id} does not fit an empty cache"
        if grant is None and self._may_chunk(sequence):
            self._blocked_head = attempt
        return grant

    def _request_blocks(self, sequence: Sequence, draft: PlanDraft, num_promised: int) -> PrefixGrant | None:
        headroom = policies.admission_headroom(
            self._settings.capacity_policy,
            num_blocks=self._kv.num_blocks,
            num_running=len(self._placement.running),
            num_promised=num_promised,
            num_growth=self._num_growth(sequence, self._kv.blocks_for(sequence.length)),
        )
        if sequence.id in self._placement.prompt_holders:
            return self._kv.start_shared(sequence.id, headroom=headroom)
        request = sequence.request
        needs_all = request.wants_prompt_logprobs and sequence.num_prompt_logprobs < request.num_prompt_tokens - 1
        return self._kv.start(
            sequence.id,
            sequence.token_ids,
            headroom=headroom,
            max_uncached_tokens=None if self._may_chunk(sequence) else draft.num_tokens_left,
            lookup=not (needs_all and sequence.index == 0),
            priority=request.inputs.priority,
        )

    def _admit(self, sequence: Sequence, grant: PrefixGrant, draft: PlanDraft) -> None:
        metrics = sequence.request.metrics
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = self._clock()
            metrics.num_cached_tokens = grant.num_cached_tokens
        self._placement.run(sequence, grant)
        draft.add_slot(sequence, grant)
        draft.add_row(sequence, min(sequence.length - grant.num_cached_tokens, draft.num_tokens_left))

    def _num_promised(self) -> int:
        """Blocks that the running sequences may still ask for."""
        return sum(self._num_growth(s, self._kv.num_blocks_of(s.id)) for s in self._placement.running)

    def _num_growth(self, sequence: Sequence, num_blocks: int) -> int:
        """Blocks that a sequence with `num_blocks` may still ask for; its last token is never computed."""
        return self._kv.blocks_for(sequence.max_length - 1) - num_blocks

    def _may_chunk(self, sequence: Sequence) -> bool:
        settings = self._settings
        return policies.may_chunk(sequence.length, settings.max_num_tokens, settings.enable_chunked_prefill)
