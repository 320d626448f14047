"""From the sampling fields of a request body to `SamplingParams`; errors name the fields as the client wrote them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tokenmill.errors import InvalidParameterError, UserError
from tokenmill.sampling_params import SamplingParams
from tokenmill.server.schemas import SamplingFields

if TYPE_CHECKING:
    from tokenmill.llm import LLM

_MAX_LOGIT_BIAS = 100.0
_SAME_NAME = (
    "n", "best_of", "seed", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "min_tokens", "ignore_eos", "stop", "stop_token_ids", "include_stop_str_in_output",
    "skip_special_tokens", "prompt_logprobs", "truncate_prompt_tokens",
)  # fmt: skip


def to_sampling_params(body: SamplingFields, **computed: Any) -> SamplingParams:
    """The request's `SamplingParams`, with OpenAI's defaults: temperature 1, top_p 1.

    Args:
        body: fields of the request.
        computed: parameters that the endpoint derives itself, e.g. `max_tokens`; they stand before the body's.

    Raises:
        InvalidParameterError: a value is out of range or contradicts another.
    """
    if body.stream_options is not None and not body.stream:
        raise InvalidParameterError(
            "stream_options is given without streaming.", field="stream_options", remedy="Set stream to true."
        )
    if body.stream and body.best_of is not None and body.best_of > (body.n or 1):
        raise InvalidParameterError(
            "best_of picks among finished answers and cannot be streamed.",
            field="best_of",
            remedy="Set stream to false, or best_of to n.",
        )
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidParameterError(
            "prompt_logprobs cannot be streamed.", field="prompt_logprobs", remedy="Set stream to false."
        )
    values: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}
    for name in _SAME_NAME:
        value = getattr(body, name)
        if value is not None:
            values[name] = value
    if body.top_k is not None:
        values["top_k"] = None if body.top_k == -1 else body.top_k
    if body.bad_words is not None:
        values["bad"] = body.bad_words
    if body.logit_bias:
        values["logit_bias"] = _parse_logit_bias(body.logit_bias)
    values.update(computed)
    return SamplingParams(**values)


def room_for_answer(llm: LLM, prompt_len: int) -> int:
    """Tokens that fit after a prompt, in the model's context and in the cache; at least 1."""
    cache = llm.stats().kv_cache
    return max(1, min(llm.max_seq_len, cache.num_blocks * cache.tokens_per_block) - prompt_len)


@contextmanager
def client_names(names: Mapping[str, str]) -> Iterator[None]:
    """Errors raised inside name the fields of the request body: `names` maps ours to the client's."""
    try:
        yield
    except UserError as error:
        error.message = error.message.removeprefix("SamplingParams.")
        if error.field is not None:
            error.field = names.get(error.field, error.field)
        raise


def _parse_logit_bias(biases: Mapping[str, float]) -> dict[int, float]:
    parsed: dict[int, float] = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise InvalidParameterError(
                f"logit_bias has the key '{key}'.", field="logit_bias", remedy="Keys are token ids, such as '42'."
            )
        if abs(bias) > _MAX_LOGIT_BIAS:
            raise InvalidParameterError(
                f"logit_bias of token {key} is {bias}.", field="logit_bias", remedy="Use values from -100 to 100."
            )
        parsed[int(key)] = bias
    return parsed
