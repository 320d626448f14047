"""Log-probabilities in OpenAI's two formats: one object a token (chat), or four parallel lists (completions)."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenmill.outputs import TokenLogprobs
from tokenmill.server.responses import (
    ChoiceLogprobs,
    CompletionLogprobs,
    ContentLogprob,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
)

if TYPE_CHECKING:
    from tokenmill.tokenization import Tokenizer

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


class TokenTexts:
    """Tokens as clients see them.

    Args:
        tokenizer: None if the engine runs without one; tokens are then written as `token_id:42`.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def raw(self, token_id: int) -> bytes | None:
        """The bytes of a token; None without a tokenizer."""
        return None if self._tokenizer is None else self._tokenizer.token_bytes(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether it is a control token rather than text."""
        return self._tokenizer is not None and self._tokenizer.is_special(token_id)

    def text(self, token_id: int, *, escape_prefix: str = "") -> str:
        """A token as text; one that is only a part of a character is written as `\\xf0\\x9f` after `escape_prefix`."""
        raw = self.raw(token_id)
        if raw is None:
            return f"token_id:{token_id}"
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return escape_prefix + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int
) -> ChoiceLogprobs:
    """The chat format, for tokens and their log-probabilities, one for one."""
    content = []
    for token_id, entry in zip(token_ids, logprobs, strict=False):
        chosen = _chat_token(texts, token_id, entry)
        content.append(
            ContentLogprob(
                token=chosen.token,
                logprob=chosen.logprob,
                bytes=chosen.bytes,
                top_logprobs=[_chat_token(texts, top, entry) for top in _most_likely(entry, num_top)],
            )
        )
    return ChoiceLogprobs(content=content, refusal=None)


def prompt_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> PromptLogprobs | None:
    """One entry for each prompt token; None for the first, which nothing precedes. None if there are none at all."""
    if not token_ids or len(logprobs) != len(token_ids) - 1:
        return None
    return [
        None,
        *(
            {
                str(token_id): PromptLogprob(
                    logprob=max(value.logprob, _LOWEST), rank=value.rank, decoded_token=texts.text(token_id)
                )
                for token_id, value in entry.items()
            }
            for entry in logprobs
        ),
    ]


class CompletionLogprobsBuilder:
    """The completions format, built piece by piece for one choice.

    `text_offset` follows the bytes of the tokens, so a token that starts inside a character has that character's
    offset. Special tokens that the text leaves out have no width.

    Args:
        texts: names the tokens.
        num_top: how many of the most likely tokens to list; the chosen one is listed besides.
        hides_special_tokens: whether the text leaves special tokens out.
    """

    def __init__(self, texts: TokenTexts, num_top: int, *, hides_special_tokens: bool) -> None:
        self._texts = texts
        self._num_top = num_top
        self._hides_special_tokens = hides_special_tokens
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add_prompt(self, text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        """The entries of an echoed prompt; the first token has no log-probability.

        Tokenizers add or swallow a space at the start of a prompt, so offsets are counted from the prompt's end.
        """
        built = self.add(token_ids, [None, *logprobs])
        surplus = self._offset - len(text)
        built.text_offset = [min(max(offset - surplus, 0), len(text)) for offset in built.text_offset]
        self._offset = len(text)
        self._decoder.reset()
        return built

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """The entries of the next tokens of the text."""
        built = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token_id, entry in zip(token_ids, logprobs, strict=False):
            built.tokens.append(self._label(token_id))
            built.text_offset.append(self._offset)
            self._offset += self._width(token_id)
            if entry is None:
                built.token_logprobs.append(None)
                built.top_logprobs.append(None)
                continue
            built.token_logprobs.append(_finite(entry, token_id))
            listed = dict.fromkeys([*_most_likely(entry, self._num_top), token_id])
            built.top_logprobs.append({self._label(top): _finite(entry, top) for top in listed})
        return built

    def _label(self, token_id: int) -> str:
        return self._texts.text(token_id, escape_prefix="bytes:")

    def _width(self, token_id: int) -> int:
        raw = self._texts.raw(token_id)
        if raw is None or (self._hides_special_tokens and self._texts.is_special(token_id)):
            return 0
        return len(self._decoder.decode(raw))


def _chat_token(texts: TokenTexts, token_id: int, entry: TokenLogprobs) -> TokenLogprob:
    raw = texts.raw(token_id)
    return TokenLogprob(
        token=texts.text(token_id), logprob=_finite(entry, token_id), bytes=None if raw is None else list(raw)
    )


def _most_likely(entry: TokenLogprobs, num_top: int) -> list[int]:
    ranked = sorted(entry.items(), key=lambda item: item[1].rank)
    return [token_id for token_id, value in ranked[:num_top] if value.rank <= num_top]


def _finite(entry: TokenLogprobs, token_id: int) -> float:
    return max(entry[token_id].logprob, _LOWEST)
