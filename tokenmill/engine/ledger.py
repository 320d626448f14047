"""`Ledger`: the requests in the engine, what is told about them, and how each comes to its one terminal event.

The scheduler opens requests here, delivers what its plans gave, and takes the events. A request is in the ledger from
`open` until its `Finished` or `Failed` event is written; whatever comes for it later is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tokenmill.engine.events import EngineEvent, Failed, Finished, TokenDelta
from tokenmill.engine.placement import Placement
from tokenmill.engine.plan import Row, RowOutput
from tokenmill.engine.sequence import Request, Sequence, SequenceStatus
from tokenmill.errors import TokenmillError
from tokenmill.outputs import FinishReason, TokenLogprobs


@dataclass(slots=True)
class Counters:
    """Totals since the engine's start."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_finished: dict[str, int] = field(default_factory=dict)
    last_step_time: float | None = None


class Ledger:
    """Requests by id, events not yet taken, and totals.

    Args:
        placement: told when a sequence ends.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(self, placement: Placement, clock: Callable[[], float]) -> None:
        self.requests: dict[int, Request] = {}
        self.counters = Counters()
        self._placement = placement
        self._clock = clock
        self._events: list[EngineEvent] = []

    @property
    def has_events(self) -> bool:
        """Whether there are events to take."""
        return bool(self._events)

    def take_events(self) -> list[EngineEvent]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def open(self, request: Request) -> None:
        """A request enters: sequence 0 waits, its siblings wait for sequence 0."""
        self.requests[request.id] = request
        self._placement.enqueue(request.sequences[0])

    def deliver(self, sequence: Sequence, row: Row, output: RowOutput, now: float) -> None:
        """A row's results become a `TokenDelta`; the sequence ends if its new token, or its length, says so."""
        prompt_logprobs = _undelivered_prompt_logprobs(sequence, row, output)
        token_id = output.token_id
        if token_id is None:
            if prompt_logprobs:
                self._events.append(TokenDelta(sequence.request.id, sequence.index, prompt_logprobs=prompt_logprobs))
            return
        sequence.token_ids.append(token_id)
        self.counters.num_generated_tokens += 1
        request = sequence.request
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
        finish_reason, is_shown = _ending(sequence, token_id)
        self._events.append(
            TokenDelta(
                request.id,
                sequence.index,
                (token_id,) if is_shown else (),
                (output.logprobs,) if is_shown and output.logprobs is not None else (),
                prompt_logprobs,
                finish_reason,
                token_id if finish_reason == "stop" and token_id in request.stop_token_ids else None,
            )
        )
        if finish_reason is not None:
            self._end_sequence(sequence, finish_reason)

    def finish(self, sequences: Iterable[Sequence], reason: FinishReason) -> None:
        """Sequences end for a reason from outside: a stop string, a cancellation, a deadline."""
        for sequence in sequences:
            if sequence.status is not SequenceStatus.FINISHED:
                self._events.append(TokenDelta(sequence.request.id, sequence.index, finish_reason=reason))
                self._end_sequence(sequence, reason)

    def fail(self, request: Request, error: TokenmillError) -> None:
        """A request ends with an error, all its sequences with it."""
        for sequence in request.sequences:
            if sequence.status is not SequenceStatus.FINISHED:
                self._placement.leave(sequence, discard=True)
        request.num_unfinished = 0
        self._close(request, error.code)
        self._events.append(Failed(request.id, error, request.metrics))

    def _end_sequence(self, sequence: Sequence, reason: FinishReason) -> None:
        request = sequence.request
        request.num_unfinished -= 1
        if request.siblings_are_pending and sequence.index == 0 and request.num_unfinished:
            self._placement.enqueue_siblings(request)
        self._placement.leave(sequence)
        if request.num_unfinished == 0:
            self._close(request, reason)
            self._events.append(Finished(request.id, request.metrics))

    def _close(self, request: Request, outcome: str) -> None:
        request.metrics.finished_time = self._clock()
        request.metrics.num_preemptions = sum(sequence.num_preemptions for sequence in request.sequences)
        self.counters.num_finished[outcome] = self.counters.num_finished.get(outcome, 0) + 1
        del self.requests[request.id]


def _ending(sequence: Sequence, token_id: int) -> tuple[FinishReason | None, bool]:
    """Whether the token, already appended, ends the sequence, and whether it is part of the answer."""
    request = sequence.request
    if token_id in request.ending_token_ids and sequence.num_generated_tokens > request.min_tokens:
        is_stop_token = token_id in request.stop_token_ids
        return "stop", is_stop_token and request.inputs.sampling.include_stop_str_in_output
    if len(sequence.token_ids) >= sequence.max_length:
        return "length", True
    return None, True


def _undelivered_prompt_logprobs(sequence: Sequence, row: Row, output: RowOutput) -> tuple[TokenLogprobs, ...]:
    """What the row gives for prompt tokens, less what was delivered before a preemption."""
    if not output.prompt_logprobs:
        return ()
    entries = output.prompt_logprobs[sequence.num_prompt_logprobs - row.start :]
    sequence.num_prompt_logprobs += len(entries)
    return entries
