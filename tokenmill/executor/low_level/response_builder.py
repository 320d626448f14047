"""`ResponseBuilder`: from the `RequestOutput`s of one request to its `Response`s, of which exactly one is final.

How many responses there are does not depend on how fast outputs are read: streaming gives one for each token, and one
without a token for a sequence that did not end with its last token (at an end token, a stop word or a cancellation).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokenmill.errors import TokenmillError
from tokenmill.executor.low_level.request import Request
from tokenmill.executor.low_level.response import FinishReason, Response, Result
from tokenmill.outputs import CompletionOutput, RequestMetrics, RequestOutput


@dataclass(slots=True)
class _Progress:
    """How much of a sequence was given."""

    num_tokens: int = 0
    cum_log_prob: float = 0.0
    ended: bool = False


class ResponseBuilder:
    """Keeps what was given already.

    Args:
        request_id: of the request.
        request: the request.
        normalize_log_probs: give the mean of log-probabilities instead of their sum.
    """

    def __init__(self, request_id: int, request: Request, *, normalize_log_probs: bool) -> None:
        self.request_id = request_id
        self.streaming = request.streaming
        self._request = request
        self._normalize_log_probs = normalize_log_probs
        self._progress = [_Progress() for _ in range(request.sampling_config.num_return_sequences)]

    def build(self, output: RequestOutput) -> list[Response]:
        """The responses that an output, newer than those before, gives rise to.

        Without streaming there are none until the output is the final one, and then one for each sequence.
        """
        metrics = output.metrics if output.finished and self._request.output_config.return_perf_metrics else None
        build_sequence = self._stream_sequence if self.streaming else self._whole_sequence
        is_readable = self.streaming or output.finished
        return [
            Response(self.request_id, self._request.client_id, result)
            for sequence in (output.outputs if is_readable else ())
            for result in build_sequence(sequence, metrics, is_last_output=output.finished)
        ]

    def fail(self, error: TokenmillError) -> Response:
        """The final response of a request that failed."""
        return Response(self.request_id, self._request.client_id, error)

    def _stream_sequence(
        self, sequence: CompletionOutput, metrics: RequestMetrics | None, *, is_last_output: bool
    ) -> Iterator[Result]:
        """A result for each token that is new.

        The end of the sequence that ends last is kept back for the last output: until then the request may still fail.
        """
        progress = self._progress[sequence.index]
        if progress.ended:
            return
        reason = _finish_reason(sequence)
        has_ended = reason is not FinishReason.NOT_FINISHED
        ends_now = is_last_output or (has_ended and not self._is_last_open(progress))
        with_last_token = reason is FinishReason.LENGTH and progress.num_tokens < len(sequence.token_ids)
        num_before_end = len(sequence.token_ids) - (1 if with_last_token else 0)
        while progress.num_tokens < num_before_end:
            yield self._next_result(sequence, progress, FinishReason.NOT_FINISHED, None)
        if ends_now:
            progress.ended = True
            yield self._next_result(sequence, progress, reason, metrics)

    def _is_last_open(self, progress: _Progress) -> bool:
        return all(other.ended or other is progress for other in self._progress)

    def _next_result(
        self, sequence: CompletionOutput, progress: _Progress, reason: FinishReason, metrics: RequestMetrics | None
    ) -> Result:
        """The next token, if there is one left, and the end of the sequence if `reason` says so."""
        start, end = progress.num_tokens, min(progress.num_tokens + 1, len(sequence.token_ids))
        progress.cum_log_prob += sum(_log_probs(sequence, start, end))
        progress.num_tokens = end
        start = 0 if self._request.return_all_generated_tokens else start
        return self._result(sequence, start, end, reason, metrics, progress.cum_log_prob)

    def _whole_sequence(
        self, sequence: CompletionOutput, metrics: RequestMetrics | None, *, is_last_output: bool
    ) -> Iterator[Result]:
        assert is_last_output
        self._progress[sequence.index].ended = True
        end = len(sequence.token_ids)
        cum_log_prob = sum(_log_probs(sequence, 0, end))
        yield self._result(sequence, 0, end, _finish_reason(sequence), metrics, cum_log_prob)

    def _result(
        self,
        sequence: CompletionOutput,
        start: int,
        end: int,
        reason: FinishReason,
        metrics: RequestMetrics | None,
        cum_log_prob: float,
    ) -> Result:
        """A result with the generated tokens from `start` to `end`."""
        output_config = self._request.output_config
        is_final = all(progress.ended for progress in self._progress)
        with_prompt = not self.streaming and not output_config.exclude_input_from_output
        prompt = self._request.input_token_ids if with_prompt else ()
        divisor = max(end, 1) if self._normalize_log_probs else 1
        return Result(
            is_final=is_final,
            output_token_ids=[[*prompt, *sequence.token_ids[start:end]]],
            finish_reasons=[reason],
            cum_log_probs=[cum_log_prob / divisor] if output_config.return_log_probs else None,
            log_probs=[_log_probs(sequence, start, end)] if output_config.return_log_probs else None,
            sequence_index=sequence.index,
            is_sequence_final=self._progress[sequence.index].ended,
            request_perf_metrics=metrics if is_final else None,
        )


def _finish_reason(sequence: CompletionOutput) -> FinishReason:
    match sequence.finish_reason:
        case None:
            return FinishReason.NOT_FINISHED
        case "stop":
            return FinishReason.END_ID if sequence.stop_reason is None else FinishReason.STOP_WORDS
        case "length":
            return FinishReason.LENGTH
        case "timeout":
            return FinishReason.TIMED_OUT
        case "cancelled":
            return FinishReason.CANCELLED


def _log_probs(sequence: CompletionOutput, start: int, end: int) -> list[float]:
    """Log-probabilities of the generated tokens from `start` to `end`; none if they were not computed."""
    pairs = zip(sequence.token_ids[start:end], sequence.logprobs[start:end], strict=False)
    return [entry[token_id].logprob for token_id, entry in pairs]
