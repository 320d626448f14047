"""Postprocessing: token deltas in, text out. Finds stop strings. Plain data on both sides.

`Postprocessor` keeps a `RequestPostprocessor` for each request and is called with everything that a step gave. It runs
where the engine does, or in postprocessing workers: the text is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from tokenmill.engine.events import EngineEvent, Failed, TokenDelta
from tokenmill.errors import EngineError, TokenmillError
from tokenmill.outputs import FinishReason, RequestMetrics, TokenLogprobs
from tokenmill.sampling_params import SamplingParams
from tokenmill.tokenization import IncrementalDetokenizer, StopStringChecker, Tokenizer


@dataclass(slots=True)  # not frozen: every row of every step makes one, in a third of the time
class OutputDelta:
    """What is new in one sequence, ready for the caller.

    Args:
        sequence_index: which of the request's sequences.
        text: new text; it may lag behind the tokens (unfinished characters, possible stop strings).
        token_ids, logprobs, prompt_logprobs: as in `TokenDelta`.
        finish_reason: set on the sequence's last delta.
        stop_reason: the stop string or stop token that ended the sequence.
    """

    sequence_index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The terminal event of a request, ready for the caller.

    Args:
        request_id: whose.
        metrics: when things happened.
        error: why it failed; None if it did not.
    """

    request_id: int
    metrics: RequestMetrics
    error: TokenmillError | None = None


@dataclass(frozen=True, slots=True)
class StopHit:
    """A sequence that ended for a reason in its text; the engine has to be told, and goes on until then."""

    request_id: int
    sequence_index: int


@dataclass(frozen=True, slots=True)
class Postprocessed:
    """What a step gave: (request id, what is new) in order, then requests that ended, and what to tell the engine."""

    outputs: list[tuple[int, OutputDelta]]
    ended: list[Ended]
    stop_hits: list[StopHit]


class _SequenceText:
    """Text of one sequence: detokenizer, then stop strings, which begin behind `min_tokens` tokens."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, prompt_token_ids: tuple[int, ...]) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids=prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens
        )
        self._stop = StopStringChecker(sampling.stop_strings, sampling.include_stop_str_in_output)
        self._num_to_pass = sampling.min_tokens or 0

    def append(self, token_ids: tuple[int, ...], is_last: bool) -> tuple[str, int, str | None]:
        """New safe text, how many of the tokens it took, and the stop string that was found."""
        text = ""
        for count, token_id in enumerate(token_ids, start=1):
            piece = self._detokenizer.append([token_id])
            if self._num_to_pass:
                self._num_to_pass -= 1
                text += piece
                continue
            safe, matched = self._stop.append(piece)
            text += safe
            if matched is not None:
                return text, count, matched
        if not is_last:
            return text, len(token_ids), None
        safe, matched = self._stop.append(self._detokenizer.flush())
        text += safe
        if matched is None:
            text += self._stop.flush()
        return text, len(token_ids), matched


class RequestPostprocessor:
    """Turns the token deltas of one request into output deltas.

    Args:
        tokenizer: None gives token ids only.
        sampling: stop strings and detokenization options.
        prompt_token_ids: context for the first token's leading space.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, sampling: SamplingParams, prompt_token_ids: tuple[int, ...]
    ) -> None:
        self._texts: list[_SequenceText] | None = None
        if tokenizer is not None and sampling.detokenize:
            self._texts = [_SequenceText(tokenizer, sampling, prompt_token_ids) for _ in range(sampling.num_sequences)]
        self.num_sequences = sampling.num_sequences
        self._ended = [False] * sampling.num_sequences

    def process(self, delta: TokenDelta) -> tuple[OutputDelta | None, bool]:
        """What to tell the caller (None: nothing, the sequence ended before), and whether a stop string ended it now.

        After a stop string the engine has to be told to end the sequence; whatever it says of it later is dropped.
        """
        index = delta.sequence_index
        if self._ended[index]:
            return None, False
        text, num_taken, matched = "", len(delta.token_ids), None
        if self._texts is not None:
            is_last = delta.finish_reason is not None
            text, num_taken, matched = self._texts[index].append(delta.token_ids, is_last)
        finish_reason = "stop" if matched is not None else delta.finish_reason
        self._ended[index] = finish_reason is not None
        output = OutputDelta(
            sequence_index=index,
            text=text,
            token_ids=delta.token_ids[:num_taken],
            logprobs=delta.logprobs[:num_taken],
            prompt_logprobs=delta.prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=matched if matched is not None else delta.stop_reason,
        )
        return output, matched is not None and delta.finish_reason is None


class Postprocessor:
    """Postprocessing of all requests of an engine, or of those that one postprocessing worker got.

    Args:
        tokenizer: None gives token ids only.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._requests: dict[int, RequestPostprocessor] = {}

    @property
    def num_requests(self) -> int:
        """Requests under way."""
        return len(self._requests)

    def open(self, request_id: int, sampling: SamplingParams, prompt_token_ids: tuple[int, ...]) -> None:
        """A request whose deltas will come."""
        self._requests[request_id] = RequestPostprocessor(self._tokenizer, sampling, prompt_token_ids)

    def forget(self, request_id: int) -> None:
        """A request of which nothing more will come. Harmless if it is not known."""
        self._requests.pop(request_id, None)

    def process(self, deltas: Iterable[TokenDelta], ended: Iterable[Ended]) -> Postprocessed:
        """What a step gave, as callers get it. Deltas of requests that are not open are dropped.

        A request whose tokens cannot be turned into text ends with `EngineError`; the others go on.
        """
        result = Postprocessed([], [], [])
        for delta in deltas:
            request = self._requests.get(delta.request_id)
            if request is None:
                continue
            try:
                output, hit_stop_string = request.process(delta)
            except Exception as error:  # the boundary of a request: whatever a tokenizer raises ends this one alone
                self._fail(delta, error, result)
                continue
            if output is not None:
                result.outputs.append((delta.request_id, output))
            if hit_stop_string:
                result.stop_hits.append(StopHit(delta.request_id, delta.sequence_index))
        for one in ended:
            if self._requests.pop(one.request_id, None) is not None:
                result.ended.append(one)
        return result

    def _fail(self, delta: TokenDelta, cause: Exception, result: Postprocessed) -> None:
        logging.getLogger(__name__).exception("The tokens of request %d have no text.", delta.request_id)
        request = self._requests.pop(delta.request_id)
        error = EngineError(f"The answer could not be turned into text: {type(cause).__name__}: {cause}.")
        result.ended.append(Ended(delta.request_id, RequestMetrics(arrival_time=0.0), error))
        result.stop_hits.extend(StopHit(delta.request_id, index) for index in range(request.num_sequences))


def split_events(events: Iterable[EngineEvent]) -> tuple[list[TokenDelta], list[Ended]]:
    """Deltas and terminal events of a step. A request's terminal event is its last, so nothing is reordered."""
    deltas: list[TokenDelta] = []
    ended: list[Ended] = []
    for event in events:
        if isinstance(event, TokenDelta):
            deltas.append(event)
        else:
            error = event.error if isinstance(event, Failed) else None
            ended.append(Ended(event.request_id, event.metrics, error))
    return deltas, ended
