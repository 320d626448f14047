"""`Ledger`: the requests in the engine, what is told about them, and how each comes to its one terminal event.

The scheduler opens requests here, delivers what its plans gave, and takes the events. A request is in the ledger from
`open` until its `Finished` or `Failed` event is written; whatever comes for it later is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

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


class MoreTokens(NamedTuple):
    """Tokens after a row's first one: how many were taken, what may be told of them, and whether they end it."""

    num_taken: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | None


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
        request = sequence.request
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
        token_ids, logprobs, ending = self._append(sequence, token_id, output.logprobs)
        finish_reason = ending.finish_reason
        if token_ids or prompt_logprobs or finish_reason is not None:
            self._events.append(
                TokenDelta(
                    request.id, sequence.index, token_ids, logprobs, prompt_logprobs, finish_reason, ending.stop_reason
                )
            )
        if finish_reason is not None:
            self._end_sequence(sequence, finish_reason)

    def take_more(self, sequence: Sequence, token_ids: Iterable[int]) -> MoreTokens:
        """Add further tokens of the step that `deliver` was called for, up to the one that ends the sequence.

        `deliver_more` tells them, and ends it; the scheduler first notes what they have computed.
        """
        told: list[int] = []
        num_taken, ending = 0, _GOES_ON
        for token_id in token_ids:
            released, _, ending = self._append(sequence, token_id, None)
            told += released
            num_taken += 1
            if ending.finish_reason is not None:
                break
        return MoreTokens(num_taken, tuple(told), ending.finish_reason, ending.stop_reason)

    def deliver_more(self, sequence: Sequence, more: MoreTokens) -> None:
        """What `take_more` has added joins the `TokenDelta` of `deliver`, if that is the last event."""
        request_id, token_ids = sequence.request.id, more.token_ids
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if token_ids or more.finish_reason is not None:
            last = self._events[-1] if self._events else None
            if isinstance(last, TokenDelta) and (last.request_id, last.sequence_index) == (request_id, sequence.index):
                self._events.pop()
                token_ids, prompt_logprobs = last.token_ids + token_ids, last.prompt_logprobs
            self._events.append(
                TokenDelta(
                    request_id, sequence.index, token_ids, (), prompt_logprobs, more.finish_reason, more.stop_reason
                )
            )
        if more.finish_reason is not None:
            self._end_sequence(sequence, more.finish_reason)

    def _append(
        self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None
    ) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...], _Ending]:
        """Add a token to its sequence: what may be told of it now, and whether the sequence ends."""
        sequence.token_ids.append(token_id)
        self.counters.num_generated_tokens += 1
        ending = _ending(sequence, token_id)
        if sequence.request.stop_words is not None:
            return *_release(sequence, token_id, logprobs, ending), ending
        if ending.num_dropped_tokens:
            return (), (), ending
        return (token_id,), () if logprobs is None else (logprobs,), ending

    def finish(self, sequences: Iterable[Sequence], reason: FinishReason) -> None:
        """Sequences end for a reason from outside: a stop string, a cancellation, a deadline."""
        for sequence in sequences:
            if sequence.status is not SequenceStatus.FINISHED:
                token_ids, logprobs = _release_all(sequence)
                self._events.append(
                    TokenDelta(sequence.request.id, sequence.index, token_ids, logprobs, finish_reason=reason)
                )
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


class _Ending(NamedTuple):
    """Whether and why a token ends its sequence, and how many of the last tokens are not part of the answer then."""

    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_dropped_tokens: int = 0


_GOES_ON = _Ending()
_TOO_LONG = _Ending("length")


def _ending(sequence: Sequence, token_id: int) -> _Ending:
    """What the token, already appended, means for its sequence. A stop word goes before an end token that ends it."""
    request = sequence.request
    if request.stop_words is not None:
        sequence.stop_word_state = request.stop_words.advance(sequence.stop_word_state, token_id)
        num_matched = request.stop_words.num_matched_tokens(sequence.stop_word_state)
        if num_matched and sequence.num_generated_tokens - num_matched >= request.min_tokens:
            is_shown = request.inputs.sampling.include_stop_str_in_output
            return _Ending("stop", token_id, 0 if is_shown else num_matched)
    if token_id in request.ending_token_ids and sequence.num_generated_tokens > request.min_tokens:
        if token_id not in request.stop_token_ids:
            return _Ending("stop", None, 1)
        return _Ending("stop", token_id, 0 if request.inputs.sampling.include_stop_str_in_output else 1)
    return _TOO_LONG if len(sequence.token_ids) >= sequence.max_length else _GOES_ON


_Tokens: TypeAlias = tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]
"""Token ids, and their log-probabilities if there are any."""


def _release(sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None, ending: _Ending) -> _Tokens:
    """Hold the token back, then let go of all held ones that are not, and cannot become, part of a stop word."""
    request = sequence.request
    assert request.stop_words is not None
    sequence.held.append((token_id, logprobs))
    if ending.finish_reason is not None:
        del sequence.held[len(sequence.held) - ending.num_dropped_tokens :]
        return _release_all(sequence)
    if request.inputs.sampling.include_stop_str_in_output:
        return _release_all(sequence)
    kept = sequence.held[len(sequence.held) - request.stop_words.num_open_tokens(sequence.stop_word_state) :]
    del sequence.held[len(sequence.held) - len(kept) :]
    released = _release_all(sequence)
    sequence.held = kept
    return released


def _release_all(sequence: Sequence) -> _Tokens:
    held, sequence.held = sequence.held, []
    return tuple(token_id for token_id, _ in held), tuple(entry for _, entry in held if entry is not None)


def _undelivered_prompt_logprobs(sequence: Sequence, row: Row, output: RowOutput) -> tuple[TokenLogprobs, ...]:
    """What the row gives for prompt tokens, less what was delivered before a preemption."""
    if not output.prompt_logprobs:
        return ()
    entries = output.prompt_logprobs[sequence.num_prompt_logprobs - row.start :]
    sequence.num_prompt_logprobs += len(entries)
    return entries
