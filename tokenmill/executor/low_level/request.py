"""`Request` of the low-level executor: a prompt as token ids, and what to do with it. Checked when it is made.

Names and defaults are those of TensorRT-LLM's `executor.Request`, `SamplingConfig` and `OutputConfig`. What depends on
the model (vocabulary, context, cache) is checked by `Executor.enqueue_request`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from tokenmill.errors import InvalidParameterError, UnsupportedFeatureError
from tokenmill.executor.low_level.checks import CompatibleModel, token_ids_of, words_of
from tokenmill.sampling_params import MAX_COUNT, SamplingParams

_InputTokenIds: TypeAlias = Annotated[tuple[int, ...], BeforeValidator(token_ids_of("input_token_ids"))]
_BadWords: TypeAlias = Annotated[tuple[tuple[int, ...], ...], BeforeValidator(words_of("bad_words"))]
_StopWords: TypeAlias = Annotated[tuple[tuple[int, ...], ...], BeforeValidator(words_of("stop_words"))]


class SamplingConfig(CompatibleModel):
    """How tokens are chosen. With `temperature`, `top_k` and `top_p` all None decoding is greedy.

    Raises:
        InvalidParameterError: a value is out of range, or contradicts another.
        UnsupportedFeatureError: beam search, or another parameter that this version cannot honour.
    """

    beam_width: int = Field(default=1, ge=1, le=MAX_COUNT)
    """Beams of a beam search; this version supports 1."""
    top_k: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    """Sample from the k most likely tokens; 0 or None: from all."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Sample from the smallest set of tokens whose probabilities sum to it."""
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    """Drop tokens less likely than this share of the most likely token's probability."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    """Makes sampling repeatable; None: a fresh one for each request."""
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    """Logits are divided by it; 0 is greedy."""
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    """The answer does not end at an end token or stop word before it has this many tokens."""
    repetition_penalty: float | None = Field(default=None, gt=0.0, le=100.0)
    """Positive logits of tokens in the prompt or answer are divided by it, negative ones multiplied."""
    presence_penalty: float | None = Field(default=None, ge=-100.0, le=100.0)
    """Subtracted from the logits of tokens that are in the answer."""
    frequency_penalty: float | None = Field(default=None, ge=-100.0, le=100.0)
    """Subtracted from logits once for each time the token is in the answer."""
    num_return_sequences: int = Field(default=1, ge=1, le=256)
    """Sequences to sample for the prompt."""

    not_yet: ClassVar[frozenset[str]] = frozenset({
        "top_p_min", "top_p_reset_ids", "top_p_decay", "beam_search_diversity_rate", "prompt_ignore_length",
        "length_penalty", "early_stopping", "no_repeat_ngram_size", "beam_width_array",
    })  # fmt: skip

    @model_validator(mode="after")
    def _check_together(self) -> SamplingConfig:
        if self.beam_width > 1:
            raise UnsupportedFeatureError(
                f"SamplingConfig.beam_width={self.beam_width}: this version has no beam search.",
                field="beam_width",
                remedy="Set it to 1; num_return_sequences samples several answers.",
            )
        is_greedy = SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p).greedy
        if self.num_return_sequences > 1 and is_greedy:
            raise InvalidParameterError(
                f"num_return_sequences ({self.num_return_sequences}) with greedy decoding would all be equal.",
                field="num_return_sequences",
                remedy="Set a temperature above 0.",
            )
        return self


class OutputConfig(CompatibleModel):
    """What a result holds."""

    return_log_probs: bool = False
    """Give `Result.log_probs` and `Result.cum_log_probs`."""
    exclude_input_from_output: bool = False
    """Leave the prompt out of `Result.output_token_ids`. Streamed results never hold it."""
    return_perf_metrics: bool = False
    """Give `Result.request_perf_metrics` with the final result."""

    not_yet: ClassVar[frozenset[str]] = frozenset(
        {"return_context_logits", "return_generation_logits", "return_encoder_output", "additional_model_outputs"}
    )


class Request(CompatibleModel):
    """A prompt and what to do with it.

    Args:
        input_token_ids: the prompt: a list, or a one-dimensional array of integers.
        max_tokens: most tokens to generate.
        values: the other fields.

    Raises:
        InvalidParameterError: a value has a wrong type or shape, or is out of range; `field` names it.
        UnknownParameterError: no such parameter, with did-you-mean.
        UnsupportedFeatureError: a parameter of TensorRT-LLM's that this version cannot honour.
    """

    input_token_ids: _InputTokenIds
    """The prompt."""
    max_tokens: int = Field(ge=1, le=MAX_COUNT)
    """Most tokens to generate."""
    streaming: bool = False
    """One response for each generated token, instead of one at the end."""
    sampling_config: SamplingConfig = Field(default_factory=SamplingConfig)
    """How tokens are chosen."""
    output_config: OutputConfig = Field(default_factory=OutputConfig)
    """What results hold."""
    end_id: int | None = Field(default=None, ge=-1, le=MAX_COUNT)
    """Token that ends the answer and is not part of it; None: the model's own end tokens; -1: none."""
    pad_id: int | None = None
    """Accepted for compatibility; sequences are never padded."""
    bad_words: _BadWords = ()
    """Token sequences that must not be generated."""
    stop_words: _StopWords = ()
    """Token sequences that end the answer. They are not part of it, and no token of one is streamed."""
    client_id: int | None = Field(default=None, ge=0, lt=2**64)
    """Any number of the caller's; comes back in every response."""
    return_all_generated_tokens: bool = False
    """Streamed results hold all tokens so far, not only the new one."""
    priority: float = Field(default=0.5, ge=0.0, le=1.0)
    """Higher runs first under the priority queue."""

    not_yet: ClassVar[frozenset[str]] = frozenset({
        "position_ids", "embedding_bias", "external_draft_tokens_config", "prompt_tuning_config", "multimodal_input",
        "multimodal_embedding", "mrope_config", "lora_config", "lookahead_config", "kv_cache_retention_config",
        "logits_post_processor_name", "logits_post_processor", "encoder_input_token_ids", "context_phase_params",
        "encoder_input_features", "encoder_output_length", "cross_attention_mask", "eagle_config",
        "skip_cross_attn_blocks", "guided_decoding_params", "language_adapter_uid", "allotted_time_ms",
        "cache_salt_id",
    })  # fmt: skip

    def __init__(self, input_token_ids: Any, max_tokens: int, **values: Any) -> None:
        super().__init__(input_token_ids=input_token_ids, max_tokens=max_tokens, **values)

    @model_validator(mode="after")
    def _check_together(self) -> Request:
        min_tokens = self.sampling_config.min_tokens
        if min_tokens is not None and min_tokens > self.max_tokens:
            raise InvalidParameterError(
                f"min_tokens ({min_tokens}) is more than max_tokens ({self.max_tokens}).", field="min_tokens"
            )
        return self
