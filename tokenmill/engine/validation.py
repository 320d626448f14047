"""`check_request`: refuse at the door what could never run, with the field at fault and what to do about it."""

from __future__ import annotations

from collections.abc import Container
from typing import Protocol

from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.stop_words import MAX_STOP_WORD_TOKENS
from tokenmill.errors import (
    AllTokensBannedError,
    InvalidParameterError,
    PromptTooLongError,
    RequestTooLargeError,
)
from tokenmill.strict_model import is_number, shown

MAX_TOKEN_ID = 2**31 - 1
"""Largest id that the tensors of a runner can hold."""


class CacheLimits(Protocol):
    """The KV cache, as far as it limits a request."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def tokens_per_block(self) -> int: ...

    def blocks_for(self, num_tokens: int) -> int: ...


class RequestLimits(Protocol):
    """The scheduler's settings, as far as they limit a request."""

    @property
    def max_batch_size(self) -> int: ...

    @property
    def max_num_tokens(self) -> int: ...

    @property
    def max_seq_len(self) -> int: ...

    @property
    def max_input_len(self) -> int | None: ...

    @property
    def enable_chunked_prefill(self) -> bool: ...


def check_request(inputs: GenerationRequest, limits: RequestLimits, kv: CacheLimits, known_ids: Container[int]) -> None:
    """Check a request against the engine's limits.

    Args:
        inputs: the request.
        limits: of the scheduler.
        kv: for the size of the cache.
        known_ids: request ids in use.

    Raises:
        InvalidParameterError: the prompt is empty, the id is in use, the priority is not a number, the stop words are
            empty or too long, or it asks for too many sequences.
        PromptTooLongError: the prompt leaves no room for an answer within `max_seq_len`, or exceeds `max_input_len`.
        RequestTooLargeError: it can never fit a step or the cache, even alone.
    """
    num_prompt_tokens = len(inputs.prompt_token_ids)
    sampling = inputs.sampling
    if inputs.request_id in known_ids:
        raise InvalidParameterError(f"A request with id {inputs.request_id} is running.", field="request_id")
    if not is_number(inputs.priority):
        raise InvalidParameterError(f"priority is {shown(inputs.priority)}.", field="priority", remedy="Give a number.")
    if num_prompt_tokens == 0:
        raise InvalidParameterError("The prompt is empty.", field="prompt", remedy="Give at least one token.")
    if num_prompt_tokens >= limits.max_seq_len:
        raise PromptTooLongError(
            f"The prompt has {num_prompt_tokens} tokens; prompt and answer together may have {limits.max_seq_len}.",
            field="prompt",
            remedy=f"Shorten it to at most {limits.max_seq_len - 1} tokens (truncate_prompt_tokens) "
            "or raise max_seq_len if the model allows it.",
        )
    if limits.max_input_len is not None and num_prompt_tokens > limits.max_input_len:
        raise PromptTooLongError(
            f"The prompt has {num_prompt_tokens} tokens; the engine was built for {limits.max_input_len} at most.",
            field="prompt",
            remedy="Shorten it (truncate_prompt_tokens), or build the engine with a larger max_input_len.",
        )
    if num_prompt_tokens > limits.max_num_tokens and not limits.enable_chunked_prefill:
        raise RequestTooLargeError(
            f"The prompt has {num_prompt_tokens} tokens, more than one step may have ({limits.max_num_tokens}), "
            "and chunked prefill is off.",
            field="prompt",
            remedy="Set enable_chunked_prefill=True or raise max_num_tokens.",
        )
    _check_stop_words(inputs)
    num_slots = min(limits.max_batch_size, limits.max_num_tokens)
    if sampling.num_sequences > num_slots:
        raise InvalidParameterError(
            f"{sampling.num_sequences} sequences are asked for; at most {num_slots} run at the same time.",
            field="n" if sampling.best_of is None else "best_of",
            remedy="Ask for fewer, or raise max_batch_size (and max_num_tokens).",
        )
    max_length = min(num_prompt_tokens + sampling.max_tokens, limits.max_seq_len)
    num_blocks = kv.blocks_for(max_length - 1)
    if num_blocks > kv.num_blocks:
        raise RequestTooLargeError(
            f"Prompt and answer need up to {max_length - 1} cached tokens ({num_blocks} blocks of "
            f"{kv.tokens_per_block}); the cache has {kv.num_blocks} blocks.",
            field="max_tokens",
            remedy="Lower max_tokens, shorten the prompt, or enlarge the cache (KvCacheConfig.max_tokens).",
        )


def _check_stop_words(inputs: GenerationRequest) -> None:
    if not all(inputs.stop_words):
        raise InvalidParameterError("stop_words holds an empty word.", field="stop_words", remedy="Remove it.")
    num_tokens = sum(map(len, inputs.stop_words))
    if num_tokens > MAX_STOP_WORD_TOKENS:
        raise InvalidParameterError(
            f"The stop words have {num_tokens} tokens together; at most {MAX_STOP_WORD_TOKENS} are allowed.",
            field="stop_words",
            remedy="Give fewer or shorter ones.",
        )


def check_token_ids(inputs: GenerationRequest, vocab_size: int) -> None:
    """Check that all token ids of a request can be looked up, and that its seed fits 64 bits.

    Raises:
        InvalidParameterError: one is out of range; `field` names the parameter.
    """
    if not -(2**63) <= inputs.seed < 2**64:
        raise InvalidParameterError(f"seed is {inputs.seed}.", field="seed", remedy="Use 64 bits.")
    ids_by_field = {
        "prompt": inputs.prompt_token_ids,
        "end_id": inputs.end_ids,
        "stop_token_ids": inputs.stop_token_ids,
        "bad": tuple(token_id for word in inputs.bad_words for token_id in word),
    }
    for field, token_ids in ids_by_field.items():
        limit = vocab_size if field == "prompt" else MAX_TOKEN_ID + 1  # others are only compared with what is sampled
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < limit):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < limit)
            raise InvalidParameterError(
                f"Token id {wrong} is not in the vocabulary (0 to {vocab_size - 1}).",
                field=field,
                remedy="Use the tokenizer that belongs to the model.",
            )


def check_bans(inputs: GenerationRequest, vocab_size: int, bad_field: str | None = None) -> None:
    """Check that the first token can be chosen. Bad words of several tokens may ban everything later on, or never.

    Args:
        inputs: the request; its token ids are in the vocabulary.
        vocab_size: of the model.
        bad_field: what its caller calls bad words; None: what `SamplingParams` does.

    Raises:
        AllTokensBannedError: `field` names the bad words, or `min_tokens` if end tokens are banned until then.
    """
    sampling = inputs.sampling
    ends = (*inputs.end_ids, *inputs.stop_token_ids) if sampling.min_tokens else ()
    of_sampling = sampling.bad_token_ids or ()
    if len(inputs.bad_words) + len(of_sampling) + len(ends) < vocab_size:
        return
    bad = {word[0] for word in inputs.bad_words if len(word) == 1}.union(of_sampling)
    if _covers(bad, vocab_size):
        field = bad_field or ("bad_token_ids" if of_sampling else "bad")
        raise AllTokensBannedError(
            f"All {vocab_size} tokens of the vocabulary are bad words.",
            field=field,
            remedy="Leave one to be generated.",
        )
    if _covers(bad.union(ends), vocab_size):
        raise AllTokensBannedError(
            f"Bad words and, because of min_tokens ({sampling.min_tokens}), tokens that end the answer are all "
            f"{vocab_size} tokens of the vocabulary: none is left for the first.",
            field="min_tokens",
            remedy="Set it to 0, or leave a token to be generated.",
        )


def _covers(banned: set[int], vocab_size: int) -> bool:
    return sum(0 <= token_id < vocab_size for token_id in banned) == vocab_size
