"""Postprocessing of one request: token deltas in, text out. Finds stop strings. Plain data on both sides.

The executor keeps one `RequestPostprocessor` for each request and calls it with every `TokenDelta` of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.engine.events import TokenDelta
from tokenmill.outputs import FinishReason, TokenLogprobs
from tokenmill.sampling_params import SamplingParams
from tokenmill.tokenization import IncrementalDetokenizer, StopStringChecker, Tokenizer


@dataclass(frozen=True, slots=True)
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


class _SequenceText:
    """Text of one sequence: detokenizer, then stop strings."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, prompt_token_ids: tuple[int, ...]) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids=prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens
        )
        self._stop = StopStringChecker(sampling.stop_strings, sampling.include_stop_str_in_output)

    def append(self, token_ids: tuple[int, ...], is_last: bool) -> tuple[str, int, str | None]:
        """New safe text, how many of the tokens it took, and the stop string that was found."""
        text = ""
        for count, token_id in enumerate(token_ids, start=1):
            safe, matched = self._stop.append(self._detokenizer.append([token_id]))
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
