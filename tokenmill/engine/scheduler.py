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
from typing import Final

from tokenmill.engine import policies
from tokenmill.engine.admission import Admission
from tokenmill.engine.events import EngineEvent
from tokenmill.engine.ledger import Ledger
from tokenmill.engine.placement import Placement
from tokenmill.engine.plan import BatchPlan, Row, RowOutput, StepOutput
from tokenmill.engine.plan_draft import PlanDraft
from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.sequence import Request, Sequence, SequenceStatus, make_request
from tokenmill.engine.settings import SchedulerSettings
from tokenmill.engine.validation import check_request
from tokenmill.errors import TokenmillError
from tokenmill.kv_cache.manager import KvCacheManager
from tokenmill.outputs import FinishReason
from tokenmill.telemetry.stats import EngineStats

WATCHED_REPEATS: Final = 16
"""Steps between two looks at tokens for which somebody waits: blocks are given out for so many."""


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
        self._num_tokens_without_memory = 0  # of a plan that there was no memory for; none as large was done since
        self._admission = Admission(settings, kv, self._placement, clock)

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
        self._admission.admit_waiting(draft)
        if self._settings.max_repeats > 1 and not self._placement.waiting and draft.is_decoding:
            draft.is_watched = any(sequence.request.is_watched for sequence in draft.sequences)
            draft.max_repeats = self._find_repeats(draft)
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
        now = self._count_steps(1 + len(output.rows[0].more_token_ids) if output.rows else 1)
        if plan.num_tokens >= self._num_tokens_without_memory:
            self._num_tokens_without_memory = 0
        for sequence, row, result in zip(sequences, plan.rows, output.rows, strict=True):
            if sequence.status is not SequenceStatus.FINISHED:
                self._commit_row(plan.step, sequence, row, result, now)
        return self._ledger.take_events()

    def fail(self, plan: BatchPlan, error: TokenmillError) -> list[EngineEvent]:
        """The runner could not do the plan: all requests in it end with `error`; returns events like `commit`."""
        self._count_steps(1)
        for sequence in self._in_flight.pop(plan.step):
            if sequence.status is not SequenceStatus.FINISHED:
                self._ledger.fail(sequence.request, error)
        return self._ledger.take_events()

    def retry(self, plan: BatchPlan, error: TokenmillError) -> list[EngineEvent]:
        """There was no memory for the plan, the last one made: its sequences wait, to be computed anew.

        If that happens again before a step as large is done, the request with most tokens in the plan ends with
        `error`: each time there is less to compute, so that it comes to an end.
        """
        self._count_steps(1)
        sequences = self._in_flight.pop(plan.step)
        if self._num_tokens_without_memory:
            largest = max(range(len(plan.rows)), key=lambda index: plan.rows[index].num_tokens)
            if sequences[largest].status is not SequenceStatus.FINISHED:
                self._ledger.fail(sequences[largest].request, error)
        self._num_tokens_without_memory = plan.num_tokens
        for sequence, row in zip(sequences, plan.rows, strict=True):
            if sequence.status is SequenceStatus.RUNNING:
                sequence.length -= row.sample  # the token that the plan would have sampled
                self._placement.preempt(sequence, plan.step + 1, discard=True)
                self._ledger.counters.num_preemptions += 1
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

    def _find_repeats(self, draft: PlanDraft) -> int:
        """How often the step may be repeated: no sequence grows beyond its end, or its blocks and those that are free.

        Nobody gives up blocks for it. Sequences whose siblings wait for them are not kept from telling their token.
        """
        found = min(self._settings.max_repeats, WATCHED_REPEATS) if draft.is_watched else self._settings.max_repeats
        for sequence in draft.sequences:
            most = 1 if sequence.request.siblings_are_pending else 1 + sequence.max_length - sequence.length
            found = min(found, most)
        for sequence in draft.sequences if found > 1 else ():
            num_tokens = sequence.num_scheduled_tokens + found - 1
            if num_tokens > sequence.num_block_tokens:
                start = self._kv.num_blocks_of(sequence.id)
                block_ids = self._kv.extend(sequence.id, num_tokens)
                if block_ids is None:
                    found = 1 + sequence.num_block_tokens - sequence.num_scheduled_tokens
                else:
                    sequence.num_block_tokens += len(block_ids) * self._kv.tokens_per_block
                    draft.add_blocks(sequence, start, block_ids)
        return found

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
                self._ledger.counters.num_preemptions += 1
        return False

    # Taking in

    def _count_steps(self, count: int) -> float:
        now = self._clock()
        self._ledger.counters.num_steps += count
        self._ledger.counters.last_step_time = now
        return now

    def _commit_row(self, step: int, sequence: Sequence, row: Row, result: RowOutput, now: float) -> None:
        request = sequence.request
        if result.error is not None:
            self._ledger.fail(request, result.error)
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
        if result.more_token_ids and sequence.status is not SequenceStatus.FINISHED:
            more = self._ledger.take_more(sequence, result.more_token_ids)  # what comes after the end is nobody's
            sequence.length += more.num_taken
            sequence.num_scheduled_tokens += more.num_taken
            sequence.num_computed_tokens = sequence.num_scheduled_tokens
            self._kv.cache_computed(sequence.id, sequence.token_ids, sequence.num_computed_tokens)
            self._ledger.deliver_more(sequence, more)
