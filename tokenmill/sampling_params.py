"""`SamplingParams`: how the tokens of one request are chosen and when it ends. Plain, checked data."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import Field, model_validator

from tokenmill.errors import InvalidParameterError, UnsupportedFeatureError
from tokenmill.strict_model import StrictModel

MAX_COUNT = 2**31 - 1
"""Largest count or token id: what fits the int32 tensors that a runner keeps."""

MAX_SEQUENCES = 256
"""Most sequences of one request."""

TokenId: TypeAlias = Annotated[int, Field(ge=0, le=MAX_COUNT)]
LogitBias: TypeAlias = Annotated[float, Field(ge=-1e30, le=1e30)]  # finite in float32 and bfloat16


class SamplingParams(StrictModel):
    """How tokens are chosen and when a request ends. Names and defaults are those of TensorRT-LLM's LLM API.

    With `temperature`, `top_k` and `top_p` all None, or `temperature=0`, or `top_k=1`, decoding is greedy.

    Raises:
        InvalidParameterError: a value is out of range, NaN, or contradicts another; `field` names it.
        UnknownParameterError: no such parameter, with did-you-mean.
        UnsupportedFeatureError: a parameter of TensorRT-LLM's that this version cannot honour.
    """

    end_id: TokenId | None = None
    """Token that ends the answer; None: the model's own end tokens."""
    pad_id: int | None = None
    """Accepted for compatibility; sequences are never padded."""
    max_tokens: int = Field(default=32, ge=1, le=MAX_COUNT)
    """Most tokens to generate."""
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    """Nothing but `max_tokens` and the context ends the answer before this many tokens: end tokens and stop tokens are
    banned, and stop strings are looked for in the text behind them."""
    ignore_eos: bool = False
    """Go on after the end token."""
    stop: str | list[str] | None = None
    """Strings that end the answer; not part of the text unless `include_stop_str_in_output`."""
    stop_token_ids: list[TokenId] | None = None
    """Tokens that end the answer."""
    include_stop_str_in_output: bool = False
    """Keep the stop string (or stop token) in the answer."""
    bad: str | list[str] | None = None
    """Words that must not be generated."""
    bad_token_ids: list[TokenId] | None = None
    """Tokens that must not be generated."""
    logit_bias: dict[TokenId, LogitBias] | None = None
    """Added to the logits of these tokens."""

    n: int = Field(default=1, ge=1, le=MAX_SEQUENCES)
    """Answers to return."""
    best_of: int | None = Field(default=None, ge=1, le=MAX_SEQUENCES)
    """Answers to generate, of which the `n` most likely are returned; None: `n`."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    """Makes sampling repeatable, whatever else runs in the batch; None: a fresh one for each request."""
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    """Logits are divided by it; 0 is greedy."""
    top_k: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    """Sample from the k most likely tokens; 0 or None: from all."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Sample from the smallest set of tokens whose probabilities sum to it."""
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    """Drop tokens less likely than this share of the most likely token's probability."""
    repetition_penalty: float | None = Field(default=None, gt=0.0, le=100.0)
    """Positive logits of tokens in the prompt or answer are divided by it, negative ones multiplied."""
    presence_penalty: float | None = Field(default=None, ge=-100.0, le=100.0)
    """Subtracted from the logits of tokens that are in the answer."""
    frequency_penalty: float | None = Field(default=None, ge=-100.0, le=100.0)
    """Subtracted from logits once for each time the token is in the answer."""

    logprobs: int | None = Field(default=None, ge=0, le=1024)
    """Log-probabilities to return for each generated token: the chosen one and this many most likely ones."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=1024)
    """The same for each prompt token but the first."""
    return_perf_metrics: bool = False
    """Accepted for compatibility; every output carries its metrics."""
    detokenize: bool = True
    """Turn tokens into text."""
    add_special_tokens: bool = True
    """Let the tokenizer add its special tokens to a text prompt."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    spaces_between_special_tokens: bool = True
    """Accepted for compatibility; text follows the tokenizer's own decoder."""
    truncate_prompt_tokens: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """Keep only the last tokens of the prompt."""

    not_yet: ClassVar[frozenset[str]] = frozenset({
        "use_beam_search", "beam_width_array", "beam_search_diversity_rate", "length_penalty", "early_stopping",
        "no_repeat_ngram_size", "top_p_min", "top_p_reset_ids", "top_p_decay", "embedding_bias", "logits_processor",
        "apply_batched_logits_processor", "lookahead_config", "guided_decoding", "return_context_logits",
        "return_generation_logits", "return_encoder_output", "additional_model_outputs",
    })  # fmt: skip
    """Parameters of TensorRT-LLM's that are known and refused, unless they are off."""

    always_on: ClassVar[frozenset[str]] = frozenset({"exclude_input_from_output"})
    """Parameters of TensorRT-LLM's that cannot be switched off."""

    def __init__(self, **values: Any) -> None:
        for name in (self.not_yet | self.always_on).intersection(values):
            if bool(values[name]) is (name in self.not_yet):
                raise UnsupportedFeatureError(
                    f"SamplingParams.{name}={values[name]!r} is not supported by this version.",
                    field=name,
                    remedy="Leave it out.",
                )
            del values[name]
        super().__init__(**values)

    @model_validator(mode="after")
    def _check_together(self) -> SamplingParams:
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidParameterError(
                f"best_of ({self.best_of}) is less than n ({self.n}).",
                field="best_of",
                remedy="Raise best_of to n or more.",
            )
        if self.num_sequences > 1 and self.greedy:
            raise InvalidParameterError(
                f"{self.num_sequences} sequences (n, best_of) with greedy decoding would all be equal.",
                field="n" if self.n > 1 else "best_of",
                remedy="Set a temperature above 0.",
            )
        if self.min_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameterError(
                f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens}).",
                field="min_tokens",
            )
        for field in ("stop", "bad"):
            if "" in getattr(self, f"{field}_strings"):
                raise InvalidParameterError(f"{field} holds an empty string.", field=field, remedy="Remove it.")
        if self.stop_strings and not self.detokenize:
            raise InvalidParameterError(
                "stop holds strings, which are looked for in the text, and detokenize is False.",
                field="stop",
                remedy="Leave detokenize at True, or use stop_token_ids.",
            )
        return self

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        if self.temperature is None and self.top_k is None and self.top_p is None:
            return True
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def num_sequences(self) -> int:
        """Sequences to generate for the request."""
        return self.best_of if self.best_of is not None else self.n

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def bad_strings(self) -> list[str]:
        """`bad` as a list."""
        return [self.bad] if isinstance(self.bad, str) else list(self.bad or [])
