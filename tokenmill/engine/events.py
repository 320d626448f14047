"""What the engine tells about a request: token deltas, then exactly one terminal event, `Finished` or `Failed`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from tokenmill.errors import TokenmillError
from tokenmill.outputs import FinishReason, RequestMetrics, TokenLogprobs


@dataclass(slots=True)  # not frozen: every row of every step makes one, in a third of the time
class TokenDelta:
    """New tokens of one sequence of a request.

    Args:
        request_id: whose.
        sequence_index: which of the request's `best_of` sequences.
        token_ids: new tokens; empty when only `finish_reason` is new. A stop token is not in it unless
            `include_stop_str_in_output`.
        logprobs: one entry for each new token, if computed.
        prompt_logprobs: new entries for prompt tokens (sequence 0 only).
        finish_reason: set on the last delta of the sequence.
        stop_reason: the stop token id given by the caller that ended it; None for the model's end token.
    """

    request_id: int
    sequence_index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """All sequences of the request ended, or it was cancelled. Terminal."""

    request_id: int
    metrics: RequestMetrics


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error. Terminal."""

    request_id: int
    error: TokenmillError
    metrics: RequestMetrics


EngineEvent: TypeAlias = TokenDelta | Finished | Failed
