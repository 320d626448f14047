"""Text from tokens as they arrive: `IncrementalDetokenizer` and `StopStringChecker`.

The postprocessing of a request owns one of each per sequence. Both give the same text however the tokens or characters
are cut into chunks, and cost constant time per token. What could still change is held back: an incomplete UTF-8
character, or text that may be the start of a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from tokenmill.errors import InvalidParameterError
from tokenmill.tokenization.decoder_style import SPACE_MARK, byte_of_token

if TYPE_CHECKING:
    from tokenmill.tokenization.tokenizer import Tokenizer

_CONTEXT_TOKENS = 8
_MAX_PENDING_TOKENS = 16
_REPLACEMENT = "�"


class IncrementalDetokenizer:
    """The text of a growing answer.

    The pieces from `append` and `flush` together are what the answer adds to the prompt's text: `decode(answer)`
    without a prompt, else `decode(prompt + answer)` after `decode(prompt)`. This is exact for byte-level tokenizers and
    sentencepiece with byte fallback; for others as long as a token's text depends on its near neighbours only.

    Args:
        tokenizer: whose tokens they are.
        prompt_token_ids: what the answer continues; decides whether a space at its start is kept.
        skip_special_tokens: leave special tokens out.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._stream: _TextStream
        if tokenizer.decoder_style.kind == "byte_level":
            self._stream = _ByteLevelStream(tokenizer, prompt_token_ids, skip_special_tokens)
        elif tokenizer.decoder_style.kind == "byte_fallback":
            self._stream = _ByteFallbackStream(tokenizer, prompt_token_ids, skip_special_tokens)
        else:
            self._stream = _WindowStream(tokenizer, prompt_token_ids, skip_special_tokens)

    def append(self, token_ids: Sequence[int]) -> str:
        """New text that is final, after these tokens; often one token's text, sometimes empty."""
        return self._stream.append(token_ids)

    def flush(self) -> str:
        """What was held back, at the end of the answer; an incomplete character becomes U+FFFD."""
        return self._stream.flush()


class _TextStream(Protocol):
    def append(self, token_ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class _ByteLevelStream:
    """Byte-level BPE: the text is the UTF-8 decoding of the tokens' bytes."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # A prompt given as tokens may end inside a character, which the answer then completes.
        self._decoder.decode(self._bytes(_visible_tail(tokenizer, prompt_token_ids, skip_special_tokens)))

    def append(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(self._bytes(token_ids))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def _bytes(self, token_ids: Iterable[int]) -> bytes:
        tokenizer = self._tokenizer
        return b"".join(
            tokenizer.token_bytes(token_id)
            for token_id in token_ids
            if not (self._skip_special_tokens and tokenizer.is_special(token_id))
        )


class _ByteFallbackStream:
    """Sentencepiece with byte fallback: tokens are text, but for byte tokens, which form characters in runs.

    A run of byte tokens is UTF-8 as a whole, or else each of its bytes becomes U+FFFD (so do the tokenizers library and
    sentencepiece). So a run is held back until another token ends it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._num_leading_spaces = tokenizer.decoder_style.num_leading_spaces
        if _visible_tail(tokenizer, prompt_token_ids, skip_special_tokens):
            self._num_leading_spaces = 0  # spaces are stripped from the start of a text only
        self._run = self._last_run(prompt_token_ids)
        self._prompt_run_text = _text_of_run(bytes(self._run))

    def append(self, token_ids: Sequence[int]) -> str:
        tokenizer = self._tokenizer
        pieces: list[str] = []
        for token_id in token_ids:
            token = tokenizer.id_to_token(token_id)
            if token is None or (self._skip_special_tokens and tokenizer.is_special(token_id)):
                continue
            byte = byte_of_token(token)
            if byte is not None:
                self._run.append(byte)
                continue
            if self._run:
                pieces.append(self._end_run())
            pieces.append(token.replace(SPACE_MARK, " "))
        return self._strip("".join(pieces))

    def flush(self) -> str:
        return self._strip(self._end_run())

    def _last_run(self, token_ids: Sequence[int]) -> bytearray:
        """The byte tokens that a prompt ends with, all of them: a run is text as a whole or not at all."""
        run = bytearray()
        for token_id in reversed(token_ids):
            if self._skip_special_tokens and self._tokenizer.is_special(token_id):
                continue
            byte = byte_of_token(self._tokenizer.id_to_token(token_id) or "")
            if byte is None:
                break
            run.append(byte)
        run.reverse()
        return run

    def _end_run(self) -> str:
        text = _text_of_run(bytes(self._run))
        self._run.clear()
        prompt_text, self._prompt_run_text = self._prompt_run_text, ""
        return text.removeprefix(prompt_text)

    def _strip(self, text: str) -> str:
        if not text or not self._num_leading_spaces:
            return text
        num_spaces = len(text) - len(text.lstrip(" "))
        num_stripped = min(num_spaces, self._num_leading_spaces)
        self._num_leading_spaces = self._num_leading_spaces - num_stripped if num_stripped == len(text) else 0
        return text[num_stripped:]


class _WindowStream:
    """Any other tokenizer: decode a window of the latest tokens twice and take the difference."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # The first `_num_context` tokens of the window have been given out; they only shape what follows.
        self._window = _visible_tail(tokenizer, prompt_token_ids, skip_special_tokens)
        self._num_context = len(self._window)

    def append(self, token_ids: Sequence[int]) -> str:
        pieces: list[str] = []
        for token_id in token_ids:
            if self._skip_special_tokens and self._tokenizer.is_special(token_id):
                continue
            self._window.append(token_id)
            text = self._new_text()
            is_complete = not text.endswith(_REPLACEMENT)
            if text and (is_complete or len(self._window) - self._num_context > _MAX_PENDING_TOKENS):
                pieces.append(text)
                self._window = self._window[-_CONTEXT_TOKENS:]
                self._num_context = len(self._window)
        return "".join(pieces)

    def flush(self) -> str:
        text = self._new_text()
        self._num_context = len(self._window)
        return text

    def _new_text(self) -> str:
        context = self._tokenizer.decode(
            self._window[: self._num_context], skip_special_tokens=self._skip_special_tokens
        )
        text = self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special_tokens)
        return text[len(context) :]


def _visible_tail(tokenizer: Tokenizer, token_ids: Sequence[int], skip_special_tokens: bool) -> list[int]:
    """The last few tokens of a prompt that show in its text."""
    tail: list[int] = []
    for token_id in reversed(token_ids):
        if not (skip_special_tokens and tokenizer.is_special(token_id)):
            tail.append(token_id)
            if len(tail) == _CONTEXT_TOKENS:
                break
    tail.reverse()
    return tail


def _text_of_run(run: bytes) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return _REPLACEMENT * len(run)


class StopStringChecker:
    """Finds the first stop string in a growing text.

    The first is the one that is complete first; of those complete at the same character, the longest. A text of which
    nothing can be part of a stop string any more is given out at once.

    Args:
        stop: the stop strings.
        include_stop: keep the stop string at the end of the text.

    Raises:
        InvalidParameterError: a stop string is empty.
    """

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        if "" in stop:
            raise InvalidParameterError("stop holds an empty string.", field="stop", remedy="Remove it.")
        self._include_stop = include_stop
        self._automaton = _Automaton(stop) if stop else None
        self._state = 0
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that was found."""
        return self._matched

    def append(self, text: str) -> tuple[str, str | None]:
        """Text that is safe to give out, and the stop string if one is complete; text behind it is dropped."""
        if self._matched is not None:
            return "", self._matched
        automaton = self._automaton
        if automaton is None:
            return text, None
        state = self._state
        for index, character in enumerate(text):
            state = automaton.step(state, character)
            matched = automaton.matches[state]
            if matched is not None:
                self._matched = matched
                seen = self._held + text[: index + 1]
                self._held = ""
                return (seen if self._include_stop else seen[: len(seen) - len(matched)]), matched
        self._state = state
        seen = self._held + text
        num_held = automaton.depths[state]
        self._held = seen[len(seen) - num_held :]
        return seen[: len(seen) - num_held], None

    def flush(self) -> str:
        """What was held back, at the end of the text; empty after a match."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """Aho-Corasick: a state is the longest end of the text that starts a stop string.

    Source: Aho and Corasick, "Efficient string matching", 1975. `depths[state]` is the length of that end,
    `matches[state]` the longest stop string with which the text ends.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._edges: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.depths = [0]
        self.matches: list[str | None] = [None]
        for pattern in patterns:
            self._insert(pattern)
        # In order of depth, so that the shorter state to fall back to is complete.
        for state in sorted(range(1, len(self.depths)), key=self.depths.__getitem__):
            for character, child in self._edges[state].items():
                self._fallback[child] = self.step(self._fallback[state], character)
            if self.matches[state] is None:
                self.matches[state] = self.matches[self._fallback[state]]

    def step(self, state: int, character: str) -> int:
        """The state after one more character; constant time on average over a text."""
        while character not in self._edges[state]:
            if state == 0:
                return 0
            state = self._fallback[state]
        return self._edges[state][character]

    def _insert(self, pattern: str) -> None:
        state = 0
        for character in pattern:
            if character not in self._edges[state]:
                self._edges[state][character] = len(self._edges)
                self._edges.append({})
                self._fallback.append(0)
                self.depths.append(self.depths[state] + 1)
                self.matches.append(None)
            state = self._edges[state][character]
        self.matches[state] = pattern
