"""The two engines behind `Tokenizer`: the `tokenizers` library, and a transformers tokenizer object.

Both speak plain ids and strings. `TokenizersBackend` is the normal one; `TransformersBackend` serves tokenizers that
exist only as Python code or as a sentencepiece model, and objects that a caller brings along.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import tokenizers

from tokenmill.errors import InvalidParameterError
from tokenmill.tokenization.decoder_style import DecoderStyle, decoder_style


class TokenizerBackend(Protocol):
    """What `Tokenizer` needs from an engine."""

    vocab_size: int
    special_ids: frozenset[int]
    decoder_style: DecoderStyle

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""
        ...

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text."""
        ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of `token_ids`."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, written as in the vocabulary."""
        ...

    def id_to_token(self, token_id: int) -> str | None:
        """The token as written in the vocabulary."""
        ...

    def save(self, folder: Path) -> Literal["auto", "slow"]:
        """Write it to an empty folder; returns the mode in which `load_tokenizer` reads it back.

        Raises:
            InvalidParameterError: the tokenizer cannot be saved.
        """
        ...


class TokenizersBackend:
    """A `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        # A tokenizer.json may carry the truncation and padding of its training; a prompt must pass whole.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.decoder_style = decoder_style(tokenizer)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text; the library spreads the work over its threads."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of `token_ids`; ids outside the vocabulary (padded embedding rows) give nothing."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, written as in the vocabulary."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        """The token as written in the vocabulary."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def save(self, folder: Path) -> Literal["auto", "slow"]:
        """Write `tokenizer.json`."""
        self._tokenizer.save(str(folder / "tokenizer.json"))
        return "auto"


class TransformersBackend:
    """A tokenizer object of the transformers library (any class with its common interface)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.special_ids = frozenset(int(token_id) for token_id in tokenizer.all_special_ids)
        self.decoder_style = DecoderStyle()
        library = getattr(tokenizer, "backend_tokenizer", None)
        if isinstance(library, tokenizers.Tokenizer):  # what its decode really leaves out, and how it joins tokens
            added = library.get_added_tokens_decoder()
            self.vocab_size = max(self.vocab_size, max(added, default=-1) + 1)
            self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
            self.decoder_style = decoder_style(library)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text."""
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of `token_ids`, spaces as they are."""
        known = [token_id for token_id in token_ids if token_id < self.vocab_size]
        text = self._tokenizer.decode(
            known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, written as in the vocabulary."""
        token_id = self._tokenizer.convert_tokens_to_ids(token)
        # Unknown tokens get the id of the unknown token; only that token itself may have it.
        if token_id is None or self.id_to_token(token_id) != token:
            return None
        return int(token_id)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as written in the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            return None
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return None if token is None else str(token)

    def save(self, folder: Path) -> Literal["auto", "slow"]:
        """Write what the object's own `save_pretrained` writes."""
        if not hasattr(self._tokenizer, "save_pretrained"):
            raise InvalidParameterError(
                f"A {type(self._tokenizer).__name__} cannot be saved, and worker processes load it from a folder.",
                field="tokenizer",
                remedy="Pass the path of a tokenizer, or set num_replicas to 0.",
            )
        self._tokenizer.save_pretrained(str(folder))
        return "slow"


def check_text(text: object, field: str) -> str:
    """`text` if it is a string that has a UTF-8 form.

    Raises:
        InvalidParameterError: it is something else, or holds half of a surrogate pair.
    """
    if not isinstance(text, str):
        raise InvalidParameterError(f"{field} must be a string, got {type(text).__name__}.", field=field)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidParameterError(
            f"{field} holds a lone surrogate ({text[error.start]!r}) at character {error.start}; it is not valid text.",
            field=field,
            remedy="Decode the bytes with errors='replace'.",
        ) from None
    return text
