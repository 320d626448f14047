"""What comes back to a caller: `RequestOutput` with its `CompletionOutput`s, named as in TensorRT-LLM's LLM API."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "timeout", "cancelled"]


class Logprob(NamedTuple):
    """Log-probability of one token and its rank among all tokens (1 is the most likely)."""

    logprob: float
    rank: int


TokenLogprobs: TypeAlias = dict[int, Logprob]
"""For one position: the chosen (or prompt) token and the most likely tokens, by token id."""


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence.

    Args:
        index: which of the request's `n` sequences.
        text: the text so far.
        token_ids: the generated tokens so far, stop tokens left out.
        cumulative_logprob: sum of the chosen tokens' log-probabilities; None if they were not computed.
        logprobs: one entry for each generated token, if asked for.
        prompt_logprobs: one entry for each prompt token but the first, if asked for.
        finish_reason: None while running; `stop`, `length`, `timeout` or `cancelled` after.
        stop_reason: the stop string or stop token id that ended it; None for the model's end token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    _last_text_len: int = field(default=0, repr=False)
    _last_num_tokens: int = field(default=0, repr=False)

    @property
    def length(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids)

    @property
    def text_diff(self) -> str:
        """Text that is new since the previous output of the stream."""
        return self.text[self._last_text_len :]

    @property
    def token_ids_diff(self) -> list[int]:
        """Tokens that are new since the previous output of the stream."""
        return self.token_ids[self._last_num_tokens :]

    @property
    def logprobs_diff(self) -> list[TokenLogprobs]:
        """Log-probabilities that are new since the previous output of the stream."""
        return self.logprobs[self._last_num_tokens :]


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of `time.monotonic`, and what the cache saved."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0


@dataclass(slots=True)
class RequestOutput:
    """The state of one request at one moment; the final one has `finished` set.

    Args:
        request_id: number of the request.
        prompt: its text; None when token ids were given.
        prompt_token_ids: its tokens.
        outputs: the `n` sequences; with `best_of` the most likely ones, best first.
        finished: no more will come.
        metrics: when things happened; complete once `finished`.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
