"""Tokenizers of each kind, small ones and those of the demo models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tests.tokenization.small_tokenizers import train_byte_level
from tokenmill.errors import ModelNotFoundError
from tokenmill.tokenization import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def byte_level() -> tokenizers.Tokenizer:
    """A byte-level tokenizer of the tokenizers library."""
    return train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


@pytest.fixture(scope="session")
def sentencepiece() -> tokenizers.Tokenizer:
    """Llama 2's pipeline over a vocabulary of bytes and a few pieces: strips the space that starts a text."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "a", "b", "ab", "▁a", "▁▁", "é", "日"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(
        vocab=vocab,
        merges=[("a", "b"), ("▁", "a"), ("▁", "▁")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="session")
def metaspace() -> tokenizers.Tokenizer:
    """A decoder whose output depends on the position: neither byte-level nor byte fallback."""
    pieces = ["<unk>", "</s>", "▁", "a", "b", "c", "▁a", "▁b", "日", "é", "!"]
    tokenizer = tokenizers.Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@pytest.fixture
def directory(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> Callable[..., Path]:
    """Writes a Hugging Face directory; each argument is a file: a dict as JSON, a string as it is."""

    def write(**files: object) -> Path:
        byte_level.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            file = tmp_path / name.replace("__", ".")
            file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path

    return write


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    return _real_model("smollm2:135m")


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path) -> Tokenizer:
    return load_tokenizer(smollm2_file)


@pytest.fixture(scope="session")
def gemma3() -> Tokenizer:
    return load_tokenizer(_real_model("gemma3:270m"))


def _real_model(alias: str) -> Path:
    from tokenmill.checkpoints.resolve import resolve_model

    try:
        return resolve_model(alias, show_progress=False)
    except ModelNotFoundError as error:
        pytest.skip(f"{alias} cannot be fetched: {error}")
