"""`Scheduler`: decides what each step computes, and takes in what it gave.

`EngineCore` calls `schedule`, hands the plan to the runner, and calls `commit` with the answer. Callers `add`, `cancel`
and `finish_sequence` between steps. `schedule` may be called again before the last plan is committed (the engine
overlaps steps); plans are committed in the order in which they were made. The rules that make this sound:

- A sampled token stays in its slot on the device, so the next row of the sequence can be planned without knowing it.
  `Sequence.length` counts it, and no row is planned beyond `max_length`.
- A sequence that ends at a commit may be in a later plan that is launched already. What that plan gives for it is
  ignored. Its slot and blocks are given back at once: whoever gets them is in a plan launched later still, and the
  device applies plans in order of launch.
- A preempted sequence resumes only when the host knows all its tokens.
- Blocks enter the prefix tree when the step that computed them is committed, so a failed step leaves nothing behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokenmill.config import CapacitySchedulerPolicy
from tokenmill.engine import policies
from tokenmill.engine.events import EngineEvent
from tokenmill.engine.ledger import Ledger
from tokenmill.engine.placement import Placement
from tokenmill.engine.plan import BatchPlan, Row, RowOutput, StepOutput
from tokenmill.engine.plan_draft import PlanDraft
from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.sequence import Request, Sequence, SequenceStatus, make_request
from tokenmill.engine.validation import check_request
from tokenmill.errors import InvalidLogitsError, TokenmillError
from tokenmill.kv_cache.manager import KvCacheManager, PrefixGrant
from tokenmill.outputs import FinishReason
from tokenmill.telemetry.stats import EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """Limits and policies.

    Args:
        max_batch_size: most sequences that run at the same time; the number of slots.
        max_num_tokens: most tokens in one step. No more sequences than this run at the same time, so that a step always
            has room for a token of each.
        max_seq_len: longest prompt plus answer.
        enable_chunked_prefill: split prompts over steps.
        capacity_policy: when a waiting sequence is admitted.
        queue_policy: order of the waiting queue.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    enable_chunked_prefill: bool = True
    capacity_policy: CapacitySchedulerPolicy = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    queue_policy: policies.QueuePolicy = "fcfs"


class Scheduler:
    """The waiting queue, the running batch, and the plans under way.

    Args:
        settings: limits and policies.
        kv: the cache's blocks; nobody else uses it.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self, settings: SchedulerSettings, kv: KvCacheManager, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._kv = kv
        self._clock = clock
        self._placement = Placement(kv, min(settings.max_batch_size, settings.max_num_tokens))
        self._ledger = Ledger(self._placement, clock)
        self._in_flight: dict[int, list[Sequence]] = {}  # step -> whose rows its plan has
        self._num_plans = 0
        self._num_arrivals = 0
        self._num_sequences = 0
        self._batch_is_closed = False
        self._blocked_head: tuple[int, int] | None = None

    # From callers

    def validate(self, inputs: GenerationRequest) -> None:
        """Check a request without queueing it. Reads nothing but limits and known ids: safe on any thread.

        Raises:
            UserError: it is malformed or can never run.
        """
        check_request(inputs, self._settings, self._kv, self._ledger.requests)

    def add(self, inputs: GenerationRequest) -> None:
        """Put a request into the waiting queue.

        Raises:
            UserError: it is malformed or can never run; nothing changed.
        """
        self.validate(inputs)
        rank = policies.request_rank(self._settings.queue_policy, inputs, self._num_arrivals)
        request = make_request(inputs, rank, self._settings.max_seq_len, self._num_sequences)
        self._num_arrivals += 1
        self._num_sequences += len(request.sequences)
        self._ledger.open(request)

    def cancel(self, request_id: int, finish_reason: FinishReason = "cancelled") -> bool:
        """End a request, whatever it is doing. False if it is not here (any more)."""
        request = self._ledger.requests.get(request_id)
        if request is None:
            return False
        request.siblings_are_pending = False
        self._ledger.finish(request.sequences, finish_reason)
        return True

    def finish_sequence(self, request_id: int, sequence_index: int, finish_reason: FinishReason) -> bool:
        """End one sequence for a reason found outside, such as a stop string. False if it has ended already."""
        request = self._ledger.requests.get(request_id)
        if request is None or request.sequences[sequence_index].status is SequenceStatus.FINISHED:
            return False
        self._ledger.finish([request.sequences[sequence_index]], finish_reason)
        return True

    # The step

    def schedule(self) -> BatchPlan:
        """Plan a step: decoding sequences first, then prefills under way, then admissions.

        The plan has no rows if there is nothing to do, or everything waits for a commit. Otherwise it must be answered
        by `commit` or `fail`.
        """
        draft = PlanDraft(self._num_plans, self._settings.max_num_tokens)
        self._continue_running(draft)
        if not draft.is_short_of_blocks:
            self._admit_waiting(draft)
        self._kv.end_plan()
        plan = draft.build()
        if plan.rows:
            self._in_flight[plan.step] = draft.sequences
            self._num_plans += 1
        return plan

    def commit(self, plan: BatchPlan, output: StepOutput) -> list[EngineEvent]:
        """Take in what a plan gave; returns all events since the last call."""
        assert next(iter(self._in_flight)) == plan.step, f"step {plan.step} is committed before an earlier one"
        sequences = self._in_flight.pop(plan.step)
        now = self._count_step()
        for sequence, row, result in zip(sequences, plan.rows, output.rows, strict=True):
            if sequence.status is not SequenceStatus.FINISHED:
                self._commit_row(plan.step, sequence, row, result, now)
        return self._ledger.take_events()

    def fail(self, plan: BatchPlan, error: TokenmillError) -> list[EngineEvent]:
        """The runner could not do the plan: all requests in it end with `error`; returns events like `commit`."""
        self._count_step()
        for sequence in self._in_flight.pop(plan.step):
            if sequence.status is not SequenceStatus.FINISHED:
                self._ledger.fail(sequence.request, error)
        return self._ledger.take_events()

    def take_events(self) -> list[EngineEvent]:
        """Events since the last `commit`, such as those of cancellations."""
        return self._ledger.take_events()

    # What is known about it

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: compute, commit or deliver events."""
        return bool(self._ledger.requests or self._in_flight or self._ledger.has_events)

    @property
    def requests(self) -> Mapping[int, Request]:
        """The requests that have not ended, by id, in order of arrival."""
        return self._ledger.requests

    def stats(self) -> EngineStats:
        """A snapshot."""
        counters = self._ledger.counters
        return EngineStats(
            num_running=len(self._placement.running),
            num_waiting=len(self._placement.waiting),
            num_steps=counters.num_steps,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_generated_tokens=counters.num_generated_tokens,
            num_preemptions=counters.num_preemptions,
            num_finished=dict(counters.num_finished),
            last_step_time=counters.last_step_time,
            kv_cache=self._kv.stats(),
        )

    def check_integrity(self) -> None:
        """Slots, queue, blocks and requests fit together.

        Raises:
            AssertionError: they do not; the message says what.
        """
        self._kv.check_integrity()
        self._placement.check_integrity()
        for request in self._ledger.requests.values():
            unfinished = [s for s in request.sequences if s.status is not SequenceStatus.FINISHED]
            assert len(unfinished) == request.num_unfinished > 0, f"request {request.id} counts {len(unfinished)}"
            pending = [s for s in unfinished if s.status is SequenceStatus.PENDING]
            assert not pending or request.siblings_are_pending, f"request {request.id} has forgotten sequences"

    # Planning

    def _continue_running(self, draft: PlanDraft) -> None:
        """Rows for what runs already: one token for each decoding sequence, then chunks of prompts."""
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self._placement.running:
            num_tokens = sequence.length - sequence.num_scheduled_tokens
            if num_tokens > 1:
                prefilling.append(sequence)
            elif num_tokens == 1 and sequence.length < sequence.max_length:
                decoding.append(sequence)
        for sequence in decoding:
            if sequence.num_scheduled_tokens < sequence.num_block_tokens or self._extend(sequence, draft):
                draft.add_row(sequence, 1)
        for sequence in prefilling:
            if sequence.status is SequenceStatus.RUNNING and draft.num_tokens_left:
                num_tokens = sequence.length - sequence.num_scheduled_tokens
                draft.add_row(sequence, min(num_tokens, draft.num_tokens_left))

    def _extend(self, sequence: Sequence, draft: PlanDraft) -> bool:
        """Append a block to a running sequence's table; on shortage others give up theirs, worst rank first.

        False if the sequence itself was, or is now, the one to give up its blocks. The best-ranked sequence never is,
        unless it runs alone, and alone every sequence fits: so there is always progress.
        """
        while sequence.status is SequenceStatus.RUNNING:
            start = self._kv.num_blocks_of(sequence.id)
            block_ids = self._kv.extend(sequence.id, sequence.length)
            if block_ids is not None:
                sequence.num_block_tokens += len(block_ids) * self._kv.tokens_per_block
                draft.add_blocks(sequence, start, block_ids)
                return True
            if not self._placement.drop_held_prompt():
                assert policies.may_preempt(self._settings.capacity_policy), "a promised block is missing"
                victim = policies.choose_victim(self._placement.running, draft.scheduled_slots())
                self._placement.preempt(victim, draft.step)
                draft.is_short_of_blocks = True
                self._ledger.counters.num_preemptions += 1
        return False

    def _admit_waiting(self, draft: PlanDraft) -> None:
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

    # Taking in

    def _count_step(self) -> float:
        now = self._clock()
        self._ledger.counters.num_steps += 1
        self._ledger.counters.last_step_time = now
        return now

    def _commit_row(self, step: int, sequence: Sequence, row: Row, result: RowOutput, now: float) -> None:
        request = sequence.request
        if result.error is not None:
            self._ledger.fail(request, InvalidLogitsError(result.error))
            return
        assert (result.token_id is not None) == row.sample, f"step {step}, slot {row.slot}: a token is missing or extra"
        if row.start < request.num_prompt_tokens:
            num_prompt_tokens = min(row.num_tokens, request.num_prompt_tokens - row.start)
            self._ledger.counters.num_prompt_tokens += num_prompt_tokens
        if step > sequence.last_lost_step:
            sequence.num_computed_tokens = row.start + row.num_tokens
            self._kv.cache_computed(sequence.id, sequence.token_ids, sequence.num_computed_tokens)
            if request.siblings_are_pending and row.sample:
                self._placement.enqueue_siblings(request)
        self._ledger.deliver(sequence, row, result, now)
