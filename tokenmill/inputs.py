"""From what a caller gives (text, token ids, messages, parameters) to a `GenerationRequest`. Called by `LLM`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from operator import index
from typing import Any, TypeAlias

from tokenmill.engine.request import GenerationRequest
from tokenmill.errors import InvalidParameterError, UnknownParameterError, did_you_mean
from tokenmill.models.config import ModelConfig
from tokenmill.sampling_params import SamplingParams
from tokenmill.strict_model import is_boolean, shown
from tokenmill.tokenization import Tokenizer

ChatMessages: TypeAlias = Sequence[dict[str, Any]]
"""A conversation: [{"role": "user", "content": "..."}, ...]."""

PromptInput: TypeAlias = str | Sequence[int] | dict[str, Any] | ChatMessages
"""One prompt: text, token ids, {"prompt": text}, {"prompt_token_ids": ids}, or a conversation."""

PreparedRequest: TypeAlias = tuple[GenerationRequest, str | None]
"""A request, and the prompt's text if it was given as text."""

_PROMPT_KEYS = ("prompt", "prompt_token_ids")


class InputProcessor:
    """Tokenizes prompts and resolves parameters that need the tokenizer or the model.

    Args:
        tokenizer: None: only token ids are accepted.
        model: for the vocabulary and the end tokens.
    """

    def __init__(self, tokenizer: Tokenizer | None, model: ModelConfig) -> None:
        self._tokenizer = tokenizer
        self._model = model

    def make_request(
        self, request_id: int, prompt: PromptInput, sampling: SamplingParams, priority: float
    ) -> PreparedRequest:
        """Tokenize and resolve.

        Raises:
            UserError: the prompt or a parameter is wrong; `field` names it.
        """
        if not isinstance(sampling, SamplingParams):
            raise InvalidParameterError(
                f"sampling_params is of type {type(sampling).__name__}, not SamplingParams.", field="sampling_params"
            )
        token_ids, text = self._tokenize(prompt, sampling)
        if sampling.truncate_prompt_tokens is not None:
            token_ids = token_ids[-sampling.truncate_prompt_tokens :]
        self._check_token_ids(token_ids, "prompt_token_ids")
        self._check_token_ids(list(sampling.logit_bias or ()), "logit_bias")
        if sampling.stop_strings:
            self._need_tokenizer("stop", "a stop string")
        _check_strings("stop", sampling.stop_strings)
        _check_strings("bad", sampling.bad_strings)
        request = GenerationRequest(
            request_id=request_id,
            prompt_token_ids=tuple(token_ids),
            sampling=sampling.model_copy(),
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            end_ids=self._end_ids(sampling),
            stop_token_ids=tuple(sampling.stop_token_ids or ()),
            bad_words=self._bad_words(sampling),
            priority=priority,
            arrival_time=time.monotonic(),
        )
        return request, text

    def apply_chat_template(self, messages: ChatMessages, template: dict[str, Any]) -> list[int]:
        """Token ids of a conversation; `template` goes to `Tokenizer.apply_chat_template`.

        Raises:
            UserError: the conversation is malformed, or the model has no chat template.
        """
        tokenizer = self._need_tokenizer("messages", "a conversation")
        token_ids = tokenizer.apply_chat_template(messages, tokenize=True, **template)
        assert isinstance(token_ids, list)
        return token_ids

    def _tokenize(self, prompt: Any, sampling: SamplingParams) -> tuple[list[int], str | None]:
        if isinstance(prompt, str):
            tokenizer = self._need_tokenizer("prompt", "a text prompt")
            return tokenizer.encode(prompt, add_special_tokens=sampling.add_special_tokens), prompt
        if isinstance(prompt, dict):
            return self._tokenize_dict(prompt, sampling)
        if is_conversation(prompt):
            return self.apply_chat_template(prompt, {}), None
        return _as_token_ids(prompt, "prompt"), None

    def _tokenize_dict(self, prompt: dict[str, Any], sampling: SamplingParams) -> tuple[list[int], str | None]:
        for name in prompt:
            if name not in _PROMPT_KEYS:
                raise UnknownParameterError(
                    f"A prompt dictionary has no key '{name}'.",
                    field=str(name),
                    remedy=did_you_mean(str(name), _PROMPT_KEYS),
                )
        text = prompt.get("prompt")
        if text is not None and not isinstance(text, str):
            raise InvalidParameterError(f"A prompt is of type {type(text).__name__}, not text.", field="prompt")
        if prompt.get("prompt_token_ids") is not None:
            return _as_token_ids(prompt["prompt_token_ids"], "prompt_token_ids"), text
        if text is not None:
            return self._tokenize(text, sampling)
        raise InvalidParameterError("A prompt dictionary needs 'prompt' (text) or 'prompt_token_ids'.", field="prompt")

    def _check_token_ids(self, token_ids: list[int], field: str) -> None:
        vocab_size = self._model.vocab_size
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
            raise InvalidParameterError(
                f"Token id {shown(wrong)} is not in the vocabulary (0 to {vocab_size - 1}).",
                field=field,
                remedy="Use the tokenizer that belongs to the model.",
            )

    def _need_tokenizer(self, field: str, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidParameterError(
                f"{what.capitalize()} needs a tokenizer, and skip_tokenizer_init is set.",
                field=field,
                remedy="Pass token ids, or create the LLM with a tokenizer.",
            )
        return self._tokenizer

    def _end_ids(self, sampling: SamplingParams) -> tuple[int, ...]:
        if sampling.ignore_eos:
            return ()
        if sampling.end_id is not None:
            return (sampling.end_id,)
        of_tokenizer = self._tokenizer.eos_token_ids if self._tokenizer is not None else ()
        return tuple(dict.fromkeys((*self._model.eos_token_ids, *of_tokenizer)))

    def _bad_words(self, sampling: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Token sequences of the bad words, each as it is spelled at the start of a text and after a space."""
        found: list[tuple[int, ...]] = [(token,) for token in sampling.bad_token_ids or ()]
        for word in sampling.bad_strings:
            tokenizer = self._need_tokenizer("bad", "a bad word")
            spellings = (word, f" {word.lstrip()}")
            found += [tuple(tokenizer.encode(spelling, add_special_tokens=False)) for spelling in spellings]
        return tuple(dict.fromkeys(found))


def is_single_prompt(inputs: Any) -> bool:
    """Whether `inputs` is one prompt: text, a dictionary, token ids or one conversation; else it is a list of prompts.

    Raises:
        InvalidParameterError: it is neither.
    """
    if isinstance(inputs, (str, dict)):
        return True
    if not _is_list(inputs):
        raise InvalidParameterError(
            f"inputs is of type {type(inputs).__name__}, not text, token ids, messages or a list of those.",
            field="inputs",
        )
    return len(inputs) > 0 and (_is_integer(inputs[0]) or is_conversation(inputs))


def is_conversation(prompt: Any) -> bool:
    """Whether `prompt` is a list of messages: dictionaries that are not prompts themselves."""
    if not _is_list(prompt) or len(prompt) == 0:
        return False
    first = prompt[0]
    return isinstance(first, dict) and not any(key in first for key in _PROMPT_KEYS)


def is_single_conversation(messages: Any) -> bool:
    """Whether `messages` is to be taken as one conversation, as a wrong one it may be; else it is a list of them."""
    return not _is_list(messages) or len(messages) == 0 or is_conversation(messages)


def _is_list(value: Any) -> bool:
    """A sequence, or an array of one dimension or more."""
    is_sequence = hasattr(value, "__len__") and hasattr(value, "__getitem__") and getattr(value, "ndim", 1) > 0
    return is_sequence and not isinstance(value, (str, bytes, dict))


def _is_integer(value: Any) -> bool:
    """An integer of Python, NumPy or torch."""
    if is_boolean(value) or getattr(value, "ndim", 0) > 0:
        return False
    try:
        index(value)
    except TypeError:
        return False
    return True


def _as_token_ids(prompt: Any, field: str) -> list[int]:
    if not _is_list(prompt):
        raise InvalidParameterError(
            f"A prompt of type {type(prompt).__name__} is neither text nor a list of token ids.", field=field
        )
    token_ids: list[Any] = list(prompt.tolist() if hasattr(prompt, "tolist") else prompt)
    if any(type(token) is not int for token in token_ids):
        wrong = [token for token in token_ids if not _is_integer(token)]
        if wrong:
            raise InvalidParameterError(f"Token ids must be integers, got {shown(wrong[0])}.", field="prompt_token_ids")
    return [index(token) for token in token_ids]


def _check_strings(field: str, strings: Sequence[str]) -> None:
    """Half of a surrogate pair is in no text, and cannot be sent to another process."""
    for string in strings:
        try:
            string.encode()
        except UnicodeEncodeError as error:
            raise InvalidParameterError(
                f"{field} holds a string that is not valid Unicode ({error}).", field=field
            ) from None
