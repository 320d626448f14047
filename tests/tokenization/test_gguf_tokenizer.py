"""Tokenizers rebuilt from GGUF metadata against the originals."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

from tests.tokenization.small_tokenizers import (
    SPECIAL,
    TEXTS,
    byte_level_metadata,
    sentencepiece_metadata,
    train_byte_level,
)
from tokenmill.errors import CheckpointError, UnsupportedFeatureError
from tokenmill.tokenization import Tokenizer, tokenizer_from_gguf_metadata
from tokenmill.tokenization.backends import TokenizersBackend


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """How tokenizer.json files split with an expression of their own."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# Pre-tokenizer and normalizer as the tokenizer.json of a model that bears the name has them.
ORIGINALS: dict[str, tuple[Callable[[], pre_tokenizers.PreTokenizer], Any]] = {
    "smollm": (  # HuggingFaceTB/SmolLM2-135M
        lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        None,
    ),
    "gpt-2": (lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), None),  # openai-community/gpt2
    "llama-bpe": (  # meta-llama/Llama-3.1-8B
        lambda: split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        ),
        None,
    ),
    "qwen2": (  # Qwen/Qwen2.5, Qwen/Qwen3
        lambda: split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        ),
        normalizers.NFC,
    ),
    "tekken": (  # mistralai/Mistral-Nemo
        lambda: split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        None,
    ),
}


def unsplit_bytes() -> tokenizers.Tokenizer:
    """Trained without splitting text into words, so that its merges tell where a pre-tokenizer cuts."""
    return train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_equals_original(pre: str) -> None:
    pre_tokenizer, normalizer = ORIGINALS[pre]
    original = unsplit_bytes()
    original.pre_tokenizer = pre_tokenizer()
    original.model.ignore_merges = pre in ("llama-bpe", "tekken")
    if normalizer is not None:
        original.normalizer = normalizer()
    rebuilt = tokenizer_from_gguf_metadata(
        byte_level_metadata(original, pre, **{"tokenizer.ggml.add_bos_token": False})
    )
    for text in TEXTS:
        ids = rebuilt.encode(text)
        assert ids == original.encode(text).ids, text
        for skip in (True, False):
            assert rebuilt.decode(ids, skip_special_tokens=skip) == original.decode(ids, skip_special_tokens=skip)
        if normalizer is None:
            assert rebuilt.decode(ids, skip_special_tokens=False) == text
    assert rebuilt.vocab_size == original.get_vocab_size()


def test_families_differ() -> None:
    """The texts above can tell the families apart: none of the equalities holds by accident."""
    original = unsplit_bytes()
    names = ("gpt-2", "smollm", "llama-bpe", "qwen2", "default", "tekken", "gpt-4o", "deepseek-v3", "falcon", "qwen35")
    ids = {}
    for pre in names:
        rebuilt = tokenizer_from_gguf_metadata(byte_level_metadata(original, pre))
        ids[pre] = json.dumps([rebuilt.encode(text, add_special_tokens=False) for text in TEXTS])
    same = [(one, other) for one, other in itertools.combinations(names, 2) if ids[one] == ids[other]]
    assert not same


def test_ignore_merges_takes_a_word_whole() -> None:
    original = train_byte_level(ORIGINALS["llama-bpe"][0]())
    metadata = byte_level_metadata(original, "llama-bpe")
    metadata["tokenizer.ggml.tokens"].append("Ġqzqzq")  # a token that no merges lead to, as Llama 3 has some
    metadata["tokenizer.ggml.token_type"].append(1)
    new_id = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert tokenizer_from_gguf_metadata(metadata).encode(" qzqzq", add_special_tokens=False) == [new_id]
    metadata["tokenizer.ggml.pre"] = "dbrx"
    assert new_id not in tokenizer_from_gguf_metadata(metadata).encode(" qzqzq", add_special_tokens=False)


@given(st.text(max_size=60))
def test_byte_level_round_trip(text: str) -> None:
    tokenizer = _smollm()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@functools.cache
def _smollm() -> Tokenizer:
    return tokenizer_from_gguf_metadata(byte_level_metadata(train_byte_level(ORIGINALS["smollm"][0]()), "smollm"))


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merges of a rebuilt tokenizer, best first."""
    backend = tokenizer._backend
    assert isinstance(backend, TokenizersBackend)
    return [(left, right) for left, right in json.loads(backend._tokenizer.to_str())["model"]["merges"]]


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_equals_transformers(prefix: bool) -> None:
    """Against transformers' own tokenizer classes, with merges by its converter of sentencepiece models."""
    metadata = sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": prefix})
    tokens = [token.replace(" ", "▁") for token in metadata["tokenizer.ggml.tokens"]]
    types = metadata["tokenizer.ggml.token_type"]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    # User-defined pieces have the score 0 in a sentencepiece model.
    scores = [0.0 if kind == 4 else score for kind, score in zip(types, metadata["tokenizer.ggml.scores"], strict=True)]
    merges = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    if prefix:
        original = LlamaTokenizer(vocab=vocab, merges=merges).backend_tokenizer
        original.pre_tokenizer = None
        original.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        original = GemmaTokenizer(vocab=vocab, merges=merges, bos_token="<s>", eos_token="</s>").backend_tokenizer
    for token, kind in zip(tokens, types, strict=True):
        if kind in (2, 3):
            original.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
        elif kind == 4:
            original.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False)])
    rebuilt = tokenizer_from_gguf_metadata(metadata)
    assert merges_of(rebuilt) == merges
    for text in [*TEXTS, "<b> bold</s>  <end_of_turn>", "\n\n\n\n    x     y"]:
        ids = rebuilt.encode(text, add_special_tokens=False)
        assert ids == original.encode(text, add_special_tokens=False).ids, text
        for skip in (True, False):
            assert rebuilt.decode(ids, skip_special_tokens=skip) == original.decode(ids, skip_special_tokens=skip)
        if not prefix and "▁" not in text and "<0x" not in text:
            assert rebuilt.decode(ids, skip_special_tokens=False) == text


def test_merges_of_a_sentencepiece_file_are_used() -> None:
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a"],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["▁ a", "a b"],
        "tokenizer.ggml.bos_token_id": 1,
    }
    tokenizer = tokenizer_from_gguf_metadata(metadata)
    assert tokenizer.encode(" ab ab") == [7, 5, 7, 5]  # no start token: the flag is absent
    assert tokenizer.encode("ab") == [6]


def test_numpy_arrays_are_accepted() -> None:
    metadata = sentencepiece_metadata()
    expected = tokenizer_from_gguf_metadata(metadata).encode(TEXTS[4])
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], dtype=np.int32)
    metadata["tokenizer.ggml.scores"] = np.array(metadata["tokenizer.ggml.scores"], dtype=np.float32)
    before = metadata["tokenizer.ggml.scores"].copy()
    assert tokenizer_from_gguf_metadata(metadata).encode(TEXTS[4]) == expected
    assert (metadata["tokenizer.ggml.scores"] == before).all(), "the caller's array was changed"


def test_start_and_end_tokens() -> None:
    original = train_byte_level(ORIGINALS["gpt-2"][0]())

    def ids(pre: str, **flags: bool) -> list[int]:
        more = {f"tokenizer.ggml.{name}": value for name, value in flags.items()}
        return tokenizer_from_gguf_metadata(byte_level_metadata(original, pre, **more)).encode("a")

    a = original.token_to_id("a")
    assert ids("gpt-2") == [a]
    assert ids("llama-bpe") == [1, a]  # that family adds a start token unless told otherwise
    assert ids("llama-bpe", add_bos_token=False) == [a]
    assert ids("gpt-2", add_bos_token=True, add_eos_token=True) == [1, a, 2]
    assert ids("gpt-2", add_eos_token=True) == [a, 2]
    both = tokenizer_from_gguf_metadata(
        byte_level_metadata(original, "gpt-2", **{"tokenizer.ggml.add_bos_token": True})
    )
    assert both.encode("a", add_special_tokens=False) == [a]
    assert tokenizer_from_gguf_metadata(sentencepiece_metadata()).encode("")[0] == 1  # sentencepiece adds one


def test_special_tokens_and_end_of_turn() -> None:
    original = train_byte_level(ORIGINALS["gpt-2"][0]())
    template = "{{ messages[0].content }}<|im_end|>"
    tokenizer = tokenizer_from_gguf_metadata(
        byte_level_metadata(
            original,
            "gpt-2",
            **{
                "tokenizer.chat_template": template,
                "tokenizer.chat_template.tool_use": "T" + template,
                "tokenizer.ggml.eos_token_id": 0,
            },
        )
    )
    assert tokenizer.eos_token_id == 0
    assert tokenizer.eos_token_ids == (0, 2)  # <|im_end|> ends turns, though the file does not say so
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 0, None)
    assert tokenizer.all_special_ids == (0, 1, 2)
    assert dict(tokenizer.chat_templates) == {"default": template, "tool_use": "T" + template}
    think = tokenizer.token_to_id("<think>")
    assert think is not None and tokenizer.encode("<think>") == [think]
    assert tokenizer.decode([think]) == "<think>"  # user-defined tokens are text
    no_template = tokenizer_from_gguf_metadata(
        byte_level_metadata(original, "gpt-2", **{"tokenizer.ggml.eos_token_id": 0})
    )
    assert no_template.eos_token_ids == (0,) and not no_template.has_chat_template


def test_end_token_typed_as_normal_is_special_all_the_same() -> None:
    original = train_byte_level(ORIGINALS["gpt-2"][0]())
    metadata = byte_level_metadata(original, "gpt-2")
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = tokenizer_from_gguf_metadata(metadata)
    assert tokenizer.encode("a<|im_end|>")[-1] == 2
    assert tokenizer.decode([2]) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.tokens": None}, "no tokens"),
        ({"tokenizer.ggml.tokens": []}, "no tokens"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "2 token types"),
        ({"tokenizer.ggml.merges": None}, "no merges"),
        ({"tokenizer.ggml.merges": ["unpaired"]}, "not a pair"),
        ({"tokenizer.ggml.merges": ["日 本"]}, "do not fit"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id 1000000"),
        ({"tokenizer.ggml.bos_token_id": -1}, "bos_token_id -1"),
    ],
)
def test_damaged_metadata(change: dict[str, Any], message: str) -> None:
    metadata = byte_level_metadata(train_byte_level(ORIGINALS["gpt-2"][0]()), "gpt-2")
    metadata.update(change)
    with pytest.raises(CheckpointError, match=message) as caught:
        tokenizer_from_gguf_metadata({key: value for key, value in metadata.items() if value is not None})
    assert caught.value.field == "tokenizer" and caught.value.remedy


def test_duplicate_token_and_scores_of_wrong_length() -> None:
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.tokens"][-1] = "▁"
    with pytest.raises(CheckpointError, match="'▁' twice"):
        tokenizer_from_gguf_metadata(metadata)
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.scores"].pop()
    with pytest.raises(CheckpointError, match="scores"):
        tokenizer_from_gguf_metadata(metadata)


def test_unknown_kinds_are_refused() -> None:
    original = train_byte_level(ORIGINALS["gpt-2"][0]())
    with pytest.raises(UnsupportedFeatureError, match="'new-model'") as caught:
        tokenizer_from_gguf_metadata(byte_level_metadata(original, "new-model"))
    assert caught.value.field == "tokenizer"
    with pytest.raises(UnsupportedFeatureError, match="'bert'"):
        tokenizer_from_gguf_metadata({**byte_level_metadata(original, "gpt-2"), "tokenizer.ggml.model": "bert"})


@pytest.mark.real_model
def test_smollm2_equals_original(smollm2_file: Path, smollm2: Tokenizer) -> None:
    """Transformers reads the file too; only its pre-tokenizer must be put right (it does not cut digits out)."""
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained(str(smollm2_file.parent), gguf_file=smollm2_file.name).backend_tokenizer
    original.pre_tokenizer = ORIGINALS["smollm"][0]()
    for text in TEXTS:
        ids = smollm2.encode(text)
        assert ids == original.encode(text).ids, text
        for skip in (True, False):
            assert smollm2.decode(ids, skip_special_tokens=skip) == original.decode(ids, skip_special_tokens=skip)
    assert smollm2.encode("12 345") == [33, 34, 216, 35, 36, 37]
    assert (smollm2.bos_token_id, smollm2.eos_token_ids, smollm2.pad_token_id) == (1, (2,), 2)
    assert smollm2.vocab_size == 49152 and len(smollm2.all_special_ids) == 17
    assert smollm2.token_to_id("<|im_end|>") == 2 == smollm2.token_to_id(SPECIAL[2])


@pytest.mark.real_model
def test_gemma3_equals_original(gemma3: Tokenizer) -> None:
    """Token ids recorded from the original tokenizer.json of Gemma 3."""
    golden = json.loads((Path(__file__).parent / "gemma3_golden.json").read_text(encoding="utf-8"))
    assert len(golden) > 30
    for case in golden:
        assert gemma3.encode(case["text"]) == case["token_ids"], case["text"]
        if "▁" not in case["text"] and "<0x" not in case["text"]:
            assert gemma3.decode(case["token_ids"][1:], skip_special_tokens=False) == case["text"]
    assert (gemma3.bos_token_id, gemma3.eos_token_id, gemma3.pad_token_id) == (2, 1, 0)
