"""Rebuilds a tokenizer from the metadata of a GGUF file.

A GGUF file carries the vocabulary, token types, and merges or scores, but not the pipeline around them. This module
builds the pipeline of the original Hugging Face tokenizer: byte-level BPE (`tokenizer.ggml.model` "gpt2") with the
named pre-tokenizer, or sentencepiece BPE ("llama", "gemma4"). Keys: GGUF specification, "Tokenizer"; their meaning:
llama.cpp's `llama-vocab.cpp`. Called by `loading.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from tokenmill.errors import CheckpointError, UnsupportedFeatureError
from tokenmill.tokenization.backends import TokenizersBackend
from tokenmill.tokenization.decoder_style import SPACE_MARK, byte_of_token
from tokenmill.tokenization.end_of_turn import end_of_turn_ids
from tokenmill.tokenization.gguf_pre_tokenizers import pre_tokenizer_family
from tokenmill.tokenization.tokenizer import SpecialTokens, Tokenizer

_REMEDY = "Download the file again, or pass the original model's tokenizer."
_ID_BITS = 21
_RESERVED = re.compile(r"<unused\d+>")


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def tokenizer_from_gguf_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file describes.

    Args:
        metadata: the file's key-value pairs; arrays are lists or numpy arrays.

    Raises:
        CheckpointError: the metadata lacks the vocabulary, or contradicts itself.
        UnsupportedFeatureError: a kind of tokenizer that this version cannot rebuild.
    """
    vocabulary = _Vocabulary(metadata)
    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        backend, add_bos = _byte_level_bpe(vocabulary, metadata)
    elif model in ("llama", "gemma4"):
        backend, add_bos = _sentencepiece_bpe(vocabulary, metadata), model == "llama"
    else:
        raise UnsupportedFeatureError(
            f"The GGUF file's tokenizer is of the kind {model!r} (tokenizer.ggml.model), which cannot be rebuilt.",
            field="tokenizer",
            remedy="Pass the original model's tokenizer: a directory with its tokenizer.json.",
        )
    templates = _chat_templates(metadata)
    # Sentencepiece's own numbering is the default there.
    default = {"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {}
    ids = {role: vocabulary.special_id(role, default.get(role)) for role in ("bos", "eos", "eot", "eom", "unknown")}
    ids["padding"] = vocabulary.special_id("padding", None)
    _add_tokens(backend, vocabulary, [ids[role] for role in ("bos", "eos", "eot", "eom")])
    _add_post_processor(
        backend,
        vocabulary,
        bos_id=ids["bos"] if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None,
        eos_id=ids["eos"] if metadata.get("tokenizer.ggml.add_eos_token", False) else None,
    )
    declared = [token_id for role in ("eos", "eot", "eom") if (token_id := ids[role]) is not None]
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special_tokens = SpecialTokens(
        bos_token_id=ids["bos"],
        eos_token_ids=end_of_turn_ids(declared, templates.values(), vocabulary.ids, vocabulary.special_ids()),
        pad_token_id=ids["padding"],
        unk_token_id=ids["unknown"],
        names={
            name: vocabulary.tokens[token_id] for name, role in roles.items() if (token_id := ids[role]) is not None
        },
    )
    return Tokenizer(TokenizersBackend(backend), special_tokens, templates)


class _Vocabulary:
    """Tokens, ids and types, checked."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        tokens = metadata.get("tokenizer.ggml.tokens")
        if tokens is None or not len(tokens):
            raise _damaged("has no tokens (tokenizer.ggml.tokens)")
        self._metadata = metadata
        types = metadata.get("tokenizer.ggml.token_type")
        self.types: list[int] = [TokenType.NORMAL] * len(tokens) if types is None else np.asarray(types).tolist()
        if len(self.types) != len(tokens):
            raise _damaged(f"has {len(tokens)} tokens but {len(self.types)} token types")
        self.tokens: list[str] = list(tokens)
        if metadata.get("tokenizer.ggml.model") != "gpt2":
            # Converters write added tokens of spaces as spaces; the vocabulary proper has U+2581.
            self.tokens = [
                SPACE_MARK * len(token) if kind == TokenType.USER_DEFINED and not token.strip(" ") else token
                for token, kind in zip(self.tokens, self.types, strict=True)
            ]
        # Converters write Gemma's reserved tokens as control tokens; in the original they are plain added tokens.
        self.types = [
            TokenType.USER_DEFINED if kind == TokenType.CONTROL and _RESERVED.fullmatch(token) else kind
            for token, kind in zip(self.tokens, self.types, strict=True)
        ]
        self.ids: dict[str, int] = {token: token_id for token_id, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for token_id, token in enumerate(self.tokens) if self.ids[token] != token_id)
            raise _damaged(f"has the token {twice!r} twice")

    def __len__(self) -> int:
        return len(self.tokens)

    def special_id(self, role: str, default: int | None) -> int | None:
        """Id of the token with a role, such as "bos".

        Raises:
            CheckpointError: the id is outside the vocabulary.
        """
        token_id = self._metadata.get(f"tokenizer.ggml.{role}_token_id")
        if token_id is None:
            return default if default is not None and default < len(self) else None
        if not 0 <= int(token_id) < len(self):
            raise _damaged(f"gives {role}_token_id {token_id}, but has {len(self)} tokens")
        return int(token_id)

    def of_type(self, *types: TokenType) -> list[str]:
        """Tokens of the given types, in order of id."""
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types]

    def special_ids(self) -> frozenset[int]:
        """Ids of control and unknown tokens."""
        special = (TokenType.CONTROL, TokenType.UNKNOWN)
        return frozenset(token_id for token_id, kind in enumerate(self.types) if kind in special)


def _byte_level_bpe(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether it adds a start token by default."""
    family = pre_tokenizer_family(str(metadata.get("tokenizer.ggml.pre", "default")))
    merges = _merges(metadata)
    if merges is None:
        raise _damaged("has no merges (tokenizer.ggml.merges)")
    model = _bpe(vocabulary, merges, ignore_merges=family.ignore_merges)
    backend = tokenizers.Tokenizer(model)
    if family.normalize_nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = family.build()
    backend.decoder = decoders.ByteLevel()
    return backend, family.add_bos


def _sentencepiece_bpe(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    merges = _merges(metadata)
    if merges is None:
        scores = metadata.get("tokenizer.ggml.scores")
        if scores is None or len(scores) != len(vocabulary):
            raise _damaged(f"has {len(vocabulary)} tokens but {0 if scores is None else len(scores)} scores")
        merges = _merges_from_scores(vocabulary, np.array(scores, dtype=np.float64))
    unknown_id = vocabulary.special_id("unknown", 0)
    model = _bpe(
        vocabulary,
        merges,
        unk_token=None if unknown_id is None else vocabulary.tokens[unknown_id],
        fuse_unk=True,
        byte_fallback=any(byte_of_token(token) is not None for token in vocabulary.of_type(TokenType.BYTE)),
    )
    backend = tokenizers.Tokenizer(model)
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", SPACE_MARK)
    if metadata.get("tokenizer.ggml.add_space_prefix", metadata.get("tokenizer.ggml.model") == "llama"):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), replace])
        steps.append(decoders.Strip(" ", left=1))
    else:
        backend.normalizer = replace
    # Splits nothing, since the normalizer leaves no spaces: BPE runs over the whole text.
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence(steps)
    return backend


def _bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocabulary.ids, merges=merges, **options)
    except Exception as error:  # the library raises bare Exception for a merge outside the vocabulary
        raise _damaged(f"has merges that do not fit its tokens ({error})") from None


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        return None
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        # From the second character on: in sentencepiece files the left part may be a space itself.
        cut = merge.find(" ", 1)
        if cut < 0:
            raise _damaged(f"has the merge {merge!r} that is not a pair")
        pairs.append((merge[:cut], merge[cut + 1 :]))
    return pairs


def _merges_from_scores(
    vocabulary: _Vocabulary, scores: np.ndarray[Any, np.dtype[np.float64]]
) -> list[tuple[str, str]]:
    """The merges that sentencepiece's scores imply, in the order in which Hugging Face's converter writes them.

    Each way to cut a token into two tokens is a merge. Better scores come first; of equal ones those with the longer
    left part, then the longer right part, then by id. User-defined tokens score 0 in the original model; converters to
    GGUF write other values for them.
    """
    scores[np.asarray(vocabulary.types) == TokenType.USER_DEFINED] = 0.0
    find = vocabulary.ids.get
    # A merge is packed into one integer: for large vocabularies there are millions of candidates.
    packed = [
        (token_id << 2 * _ID_BITS) | (left << _ID_BITS) | right
        for token, token_id in vocabulary.ids.items()
        for cut in range(1, len(token))
        if (right := find(token[cut:])) is not None and (left := find(token[:cut])) is not None
    ]
    merges = np.array(packed, dtype=np.int64)
    mask = (1 << _ID_BITS) - 1
    whole, left_ids, right_ids = merges >> 2 * _ID_BITS, (merges >> _ID_BITS) & mask, merges & mask
    lengths = np.array([len(token) for token in vocabulary.tokens])
    order = np.lexsort((right_ids, left_ids, whole, -lengths[right_ids], -lengths[left_ids], -scores[whole]))
    tokens = vocabulary.tokens
    return [
        (tokens[left], tokens[right])
        for left, right in zip(left_ids[order].tolist(), right_ids[order].tolist(), strict=True)
    ]


def _add_tokens(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary, roles: Sequence[int | None]) -> None:
    """Tokens that are matched whole in a text: control tokens (special) and user-defined ones (plain)."""
    special = dict.fromkeys(vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN))
    # Some files type their end tokens as normal; a token with a role is special whatever its type.
    special.update(dict.fromkeys(vocabulary.tokens[token_id] for token_id in roles if token_id is not None))
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    user_defined = [token for token in vocabulary.of_type(TokenType.USER_DEFINED) if token not in special]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in user_defined])


def _add_post_processor(
    backend: tokenizers.Tokenizer, vocabulary: _Vocabulary, *, bos_id: int | None, eos_id: int | None
) -> None:
    """Put the start token before and the end token behind a text, where they are given."""
    if bos_id is None and eos_id is None:
        return
    bos, eos = [[] if token_id is None else [vocabulary.tokens[token_id]] for token_id in (bos_id, eos_id)]
    backend.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        special_tokens=[(token, vocabulary.ids[token]) for token in dict.fromkeys(bos + eos)],
    )


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    templates = {}
    if metadata.get("tokenizer.chat_template"):
        templates["default"] = str(metadata["tokenizer.chat_template"])
    prefix = "tokenizer.chat_template."
    for key, value in metadata.items():
        if key.startswith(prefix) and isinstance(value, str):
            templates[key.removeprefix(prefix)] = value
    return templates


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"The GGUF file's tokenizer {what}.", field="tokenizer", remedy=_REMEDY)
