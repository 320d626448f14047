"""`check_request`: refuse at the door what could never run, with the field at fault and what to do about it."""

from __future__ import annotations

from collections.abc import Container
from math import isfinite
from typing import Protocol

from tokenmill.engine.request import GenerationRequest
from tokenmill.errors import InvalidParameterError, PromptTooLongError, RequestTooLargeError


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
    def enable_chunked_prefill(self) -> bool: ...


def check_request(inputs: GenerationRequest, limits: RequestLimits, kv: CacheLimits, known_ids: Container[int]) -> None:
    """Check a request against the engine's limits.

    Args:
        inputs: the request.
        limits: of the scheduler.
        kv: for the size of the cache.
        known_ids: request ids in use.

    Raises:
        InvalidParameterError: the prompt is empty, the id is in use, the priority is not a number, or it asks for too
            many sequences.
        PromptTooLongError: the prompt leaves no room for an answer within `max_seq_len`.
        RequestTooLargeError: it can never fit a step or the cache, even alone.
    """
    num_prompt_tokens = len(inputs.prompt_token_ids)
    sampling = inputs.sampling
    if inputs.request_id in known_ids:
        raise InvalidParameterError(f"A request with id {inputs.request_id} is running.", field="request_id")
    if not isfinite(inputs.priority):
        raise InvalidParameterError(f"priority is {inputs.priority}.", field="priority", remedy="Give a number.")
    if num_prompt_tokens == 0:
        raise InvalidParameterError("The prompt is empty.", field="prompt", remedy="Give at least one token.")
    if num_prompt_tokens >= limits.max_seq_len:
        raise PromptTooLongError(
            f"The prompt has {num_prompt_tokens} tokens; prompt and answer together may have {limits.max_seq_len}.",
            field="prompt",
            remedy=f"Shorten it to at most {limits.max_seq_len - 1} tokens (truncate_prompt_tokens) "
            "or raise max_seq_len if the model allows it.",
        )
    if num_prompt_tokens > limits.max_num_tokens and not limits.enable_chunked_prefill:
        raise RequestTooLargeError(
            f"The prompt has {num_prompt_tokens} tokens, more than one step may have ({limits.max_num_tokens}), "
            "and chunked prefill is off.",
            field="prompt",
            remedy="Set enable_chunked_prefill=True or raise max_num_tokens.",
        )
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
