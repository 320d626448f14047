"""`Response` and `Result`: what the low-level executor gives back. Named as in TensorRT-LLM's `executor`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from tokenmill.errors import TokenmillError
from tokenmill.outputs import RequestMetrics


class FinishReason(IntEnum):
    """Why a sequence ended."""

    NOT_FINISHED = 0
    """It goes on."""
    END_ID = 1
    """The end token came."""
    STOP_WORDS = 2
    """A stop word came."""
    LENGTH = 3
    """It has `max_tokens` tokens, or fills the model's context."""
    TIMED_OUT = 4
    """Its deadline passed."""
    CANCELLED = 5
    """`Executor.cancel_request` was called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What is new of one sequence of a request. Lists have one entry for each beam, which is one.

    Args:
        is_final: the last response of the request.
        output_token_ids: `[beam][token]`. Streaming: the new token (or, with `return_all_generated_tokens`, all so
            far), none if the sequence ended at a token that is not part of it. Else: the prompt (unless
            `exclude_input_from_output`) and the answer.
        finish_reasons: `[beam]`.
        cum_log_probs: `[beam]`: sum of the log-probabilities of all tokens so far (or their mean, with
            `ExecutorConfig.normalize_log_probs`); with `return_log_probs`.
        log_probs: `[beam][token]`: log-probabilities of the generated tokens in `output_token_ids`, over the whole
            vocabulary, before temperature and filters; with `return_log_probs`.
        sequence_index: which of the request's `num_return_sequences` sequences.
        is_sequence_final: the last response of this sequence.
        request_perf_metrics: when things happened, with the final result; with `return_perf_metrics`.
    """

    is_final: bool
    output_token_ids: list[list[int]]
    finish_reasons: list[FinishReason]
    cum_log_probs: list[float] | None = None
    log_probs: list[list[float]] | None = None
    sequence_index: int = 0
    is_sequence_final: bool = False
    request_perf_metrics: RequestMetrics | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """A result or an error of one request.

    Args:
        request_id: the number that `enqueue_request` gave.
        client_id: the caller's own number, from the request.
        content: the result or the error.
    """

    request_id: int
    client_id: int | None
    content: Result | TokenmillError

    def has_error(self) -> bool:
        """Whether the request failed; `result` raises then."""
        return isinstance(self.content, TokenmillError)

    @property
    def is_final(self) -> bool:
        """Whether this is the request's last response. Errors are."""
        return isinstance(self.content, TokenmillError) or self.content.is_final

    @property
    def error(self) -> TokenmillError | None:
        """The error, if there is one."""
        return self.content if isinstance(self.content, TokenmillError) else None

    @property
    def error_msg(self) -> str:
        """The error's text; empty without an error."""
        return str(self.content) if isinstance(self.content, TokenmillError) else ""

    @property
    def result(self) -> Result:
        """The result.

        Raises:
            TokenmillError: the request failed: this is its error.
        """
        if isinstance(self.content, TokenmillError):
            raise self.content
        return self.content
