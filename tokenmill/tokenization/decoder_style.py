"""How a tokenizer turns tokens into bytes, read off its decoder.

Two decoders cover nearly every language model: byte-level (GPT-2's alphabet of 256 characters stands for bytes) and
sentencepiece with byte fallback (`▁` is a space, `<0xE2>` a byte). For both, the bytes of a token do not depend on its
neighbours, which is what exact incremental detokenization and the `bytes` of OpenAI's logprobs rest on. `Tokenizer` and
`IncrementalDetokenizer` use this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import tokenizers

SPACE_MARK = "▁"
"""Sentencepiece writes a space as U+2581."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(printable))
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


BYTE_OF_CHARACTER: Mapping[str, int] = MappingProxyType(_byte_alphabet())
"""Byte-level alphabet: the byte for which a character of a token stands."""


@dataclass(frozen=True, slots=True)
class DecoderStyle:
    """What kind of decoder a tokenizer has.

    Args:
        kind: `byte_level`, `byte_fallback` (sentencepiece), or `other`: anything whose output depends on neighbours.
        num_leading_spaces: with `byte_fallback`, how many spaces are stripped from the start of a text.
    """

    kind: Literal["byte_level", "byte_fallback", "other"] = "other"
    num_leading_spaces: int = 0

    def token_bytes(self, token: str) -> bytes:
        """The bytes that `token` adds to a text (not necessarily whole UTF-8 characters)."""
        if self.kind == "byte_level":
            try:
                return bytes([BYTE_OF_CHARACTER[character] for character in token])
            except KeyError:  # an added token, written as it is
                return token.encode()
        byte = byte_of_token(token)
        if byte is not None:
            return bytes([byte])
        return token.replace(SPACE_MARK, " ").encode()


def byte_of_token(token: str) -> int | None:
    """The byte for which a sentencepiece byte token such as `<0xE2>` stands; None for any other token."""
    if len(token) != 6:
        return None
    match = _BYTE_TOKEN.fullmatch(token)
    return int(match.group(1), 16) if match else None


def decoder_style(backend: tokenizers.Tokenizer) -> DecoderStyle:
    """The style of `backend`'s decoder."""
    if backend.decoder is None:
        return DecoderStyle()
    state = json.loads(backend.decoder.__getstate__())
    if state["type"] == "ByteLevel":
        return DecoderStyle("byte_level")
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return DecoderStyle("byte_level")
    return _sentencepiece_style(steps)


def _sentencepiece_style(steps: list[dict[str, Any]]) -> DecoderStyle:
    replace = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    if steps[:3] != [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]:
        return DecoderStyle()
    if len(steps) == 3:
        return DecoderStyle("byte_fallback")
    strip = steps[3]
    if len(steps) == 4 and strip["type"] == "Strip" and strip["content"] == " " and strip["stop"] == 0:
        return DecoderStyle("byte_fallback", num_leading_spaces=strip["start"])
    return DecoderStyle()
