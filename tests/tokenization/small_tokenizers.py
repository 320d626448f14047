"""Small trained tokenizers, their GGUF metadata, and texts that tokenizers get wrong."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from tokenmill.tokenization import SpecialTokens, Tokenizer
from tokenmill.tokenization.backends import TokenizersBackend

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>", "</think>"]

TEXTS = [
    "",
    " ",
    "\n\n",
    "Hello, world!",
    "  leading and trailing   ",
    "mixed   spaces\t\ttabs\r\n and\n\n\nlines" + " " * 30 + "end",
    "1234567890 3.14 1,000,000 x2y33z444",
    "٣٤٥ ½ ² Ⅷ ①②",
    "don't I'LL we'Ve the 'S of 's",
    "日本語のテキスト、中文。한국어",
    "Привет, мир! Ελληνικά עברית العربية हिन्दी ไทย",
    "\U0001f642 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "e\u0301 é ﬁ Å \u212b \u0344",
    "<|im_start|>user\nhi<|im_end|>\n<think>x</think><|im_en",
    "def f(x):\n    if x:\n\t\treturn {'a': [1, 2]}  # c\n",
    "https://example.com/a?b=c&d=%20#f",
    "\u00a0\u3000\u2028\ufeff\u0000\u0001\x7f",
    "▁under▁score <0x0A> Ġ",
    "CamelCaseHTTPServer snake_case_name",
    "the theme of these others " * 20,
    "x" * 200,
]


def train_byte_level(
    pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer with a few hundred merges, all 256 bytes, special and user-defined tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        min_frequency=1,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in USER_DEFINED])
    return tokenizer


def byte_level_metadata(tokenizer: tokenizers.Tokenizer, pre: str, **more: Any) -> dict[str, Any]:
    """What a converter writes into a GGUF file for a byte-level tokenizer."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=ids.__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    types = [3 if token in SPECIAL else 4 if token in USER_DEFINED else 1 for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        **more,
    }


def sentencepiece_metadata(**more: Any) -> dict[str, Any]:
    """GGUF metadata of a sentencepiece vocabulary: byte tokens, user-defined tokens of spaces, scored pieces."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=400, min_frequency=1, show_progress=False, limit_alphabet=100, max_token_length=8
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    ids = tokenizer.get_vocab()
    pieces = [piece for piece in sorted(ids, key=ids.__getitem__) if piece.strip("▁\n")]
    control = ["<unk>", "<s>", "</s>", "<end_of_turn>"]
    user_defined = ["\n", "\n\n", "  ", "   ", "    ", "<b>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["▁", *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": control + user_defined + byte_tokens + pieces,
        "tokenizer.ggml.token_type": [2, 3, 3, 3] + [4] * len(user_defined) + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [-1000.0] * (4 + len(user_defined) + 256) + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
        **more,
    }


def wrap(tokenizer: tokenizers.Tokenizer, **names: str) -> Tokenizer:
    """A `Tokenizer` around a library object."""
    return Tokenizer(TokenizersBackend(tokenizer), SpecialTokens(names=names))
