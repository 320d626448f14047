"""Tokenizers from Hugging Face directories, GGUF files and ready objects."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tokenization.small_tokenizers import SPECIAL, TEXTS, byte_level_metadata, sentencepiece_metadata
from tokenmill.errors import CheckpointError, InvalidParameterError, UnsupportedFeatureError
from tokenmill.tokenization import Tokenizer, load_tokenizer, tokenizer_from_gguf_metadata, wrap_tokenizer

Directory = Callable[..., Path]
CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": {"content": "<|im_start|>", "special": True, "__type": "AddedToken"},
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
}
MESSAGES = [{"role": "user", "content": "hi"}]


def test_directory(directory: Directory) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    tokenizer = load_tokenizer(directory(tokenizer_config__json={**CONFIG, "chat_template": template}))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert (tokenizer.unk_token_id, tokenizer.eos_token_ids) == (None, (2,))
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "<|im_start|>hi<|im_end|>"


def test_directory_equals_transformers(directory: Directory) -> None:
    path = directory(tokenizer_config__json={**CONFIG, "chat_template": "{{ bos_token }}{{ messages[0].content }}"})
    ours = load_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(str(path))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert ours.apply_chat_template(MESSAGES, add_generation_prompt=False) == expected


def test_special_tokens_map_stands_in(directory: Directory) -> None:
    path = directory(special_tokens_map__json={"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"})
    tokenizer = load_tokenizer(path / "tokenizer.json")  # the file itself will do
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_end_tokens_of_the_generation_config(directory: Directory) -> None:
    path = directory(tokenizer_config__json=CONFIG, generation_config__json={"eos_token_id": [0, 2]})
    assert load_tokenizer(path).eos_token_ids == (2, 0)
    (path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert load_tokenizer(path).eos_token_ids == (2, 0)
    (path / "generation_config.json").unlink()
    (path / "config.json").write_text('{"eos_token_id": 1}')
    assert load_tokenizer(path).eos_token_ids == (2, 1)
    (path / "tokenizer_config.json").write_text(json.dumps({**CONFIG, "eos_token": "<|endoftext|>"}))
    (path / "config.json").unlink()
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>")
    assert load_tokenizer(path).eos_token_ids == (0, 2)


@pytest.mark.parametrize(
    ("flags", "start", "end"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [1], []),
        ({"add_bos_token": False, "add_eos_token": True}, [], ["eos"]),
        ({"add_bos_token": True, "add_eos_token": True}, [1], ["eos"]),
    ],
)
@pytest.mark.parametrize("eos", ["<|im_end|>", "<|im_start|>"])
def test_start_and_end_flags(directory: Directory, flags: dict[str, bool], start: Any, end: Any, eos: str) -> None:
    """Llama's and Gemma's classes read the flags; for all others tokenizer.json alone counts, as in transformers."""
    config = {**CONFIG, **flags, "eos_token": eos}
    path = directory(tokenizer_config__json={**config, "tokenizer_class": "LlamaTokenizerFast"})
    tokenizer = load_tokenizer(path)
    bare = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == start + bare + [tokenizer.token_to_id(eos)] * len(end)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(path).encode("hello") == bare == AutoTokenizer.from_pretrained(str(path)).encode("hello")


def test_flags_override_the_file(directory: Directory, sentencepiece: tokenizers.Tokenizer) -> None:
    """tokenizer.json adds a start token, tokenizer_config.json says not to."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    path = directory(tokenizer_config__json=config)
    sentencepiece.save(str(path / "tokenizer.json"))
    assert load_tokenizer(path).encode("ab")[0] == 1
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    assert load_tokenizer(path).encode("ab")[0] != 1


def test_added_tokens(directory: Directory, byte_level: tokenizers.Tokenizer) -> None:
    """Tokens that only tokenizer_config.json declares are added under their ids; flags there win."""
    new_id = byte_level.get_vocab_size()
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    declared = {
        str(new_id): {"content": "<tool>", "special": False, **flags},
        str(new_id + 1): {"content": "<hidden>", "special": True, **flags},
        "0": {"content": "<|endoftext|>", "special": True, **flags},
    }
    tokenizer = load_tokenizer(directory(tokenizer_config__json={**CONFIG, "added_tokens_decoder": declared}))
    assert tokenizer.encode("<tool><hidden>") == [new_id, new_id + 1]
    assert tokenizer.decode([new_id, new_id + 1]) == "<tool>"
    assert tokenizer.vocab_size == new_id + 2 and tokenizer.is_special(new_id + 1)
    think = byte_level.token_to_id("<think>")
    declared[str(think)] = {"content": "<think>", "special": True, **flags}
    tokenizer = load_tokenizer(directory(tokenizer_config__json={**CONFIG, "added_tokens_decoder": declared}))
    assert tokenizer.is_special(think)
    declared[str(new_id)]["content"] = "<think>x"
    declared[str(new_id + 7)] = {"content": "<far>", "special": True, **flags}
    path = directory(tokenizer_config__json={**CONFIG, "added_tokens_decoder": declared})
    with pytest.raises(CheckpointError, match="'<far>'") as caught:
        load_tokenizer(path)
    assert caught.value.field == "tokenizer"


def test_special_token_missing_from_the_vocabulary_is_added(directory: Directory) -> None:
    path = directory(tokenizer_config__json={**CONFIG, "pad_token": "[PAD]"})
    tokenizer = load_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(str(path))
    assert tokenizer.pad_token_id == theirs.pad_token_id is not None
    assert tokenizer.encode("[PAD]") == [tokenizer.pad_token_id]


def test_chat_template_sources(directory: Directory) -> None:
    listed = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    path = directory(tokenizer_config__json={**CONFIG, "chat_template": listed})
    assert dict(load_tokenizer(path).chat_templates) == {"default": "D", "tool_use": "T"}
    (path / "chat_template.json").write_text('{"chat_template": "J"}')
    assert load_tokenizer(path).chat_templates["default"] == "D"
    (path / "chat_template.jinja").write_text("F é", encoding="utf-8")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert dict(load_tokenizer(path).chat_templates) == {"default": "F é", "tool_use": "T", "rag": "R"}
    assert load_tokenizer(path).apply_chat_template(MESSAGES, chat_template="rag", tokenize=False) == "R"
    (path / "tokenizer_config.json").write_text("{}")
    (path / "chat_template.jinja").unlink()
    assert load_tokenizer(path).chat_templates["default"] == "J"


def test_slow_mode(directory: Directory) -> None:
    path = directory(
        tokenizer_config__json={**CONFIG, "chat_template": "{{ messages[0].content }}<|im_end|>"},
        generation_config__json={"eos_token_id": [0]},
    )
    auto, slow = load_tokenizer(path), load_tokenizer(path, mode="slow")
    for text in TEXTS:
        assert slow.encode(text) == auto.encode(text)
        assert slow.decode(slow.encode(text), skip_special_tokens=False) == text
    assert slow.eos_token_ids == auto.eos_token_ids == (2, 0)
    assert slow.bos_token_id == auto.bos_token_id
    assert slow.apply_chat_template(MESSAGES) == auto.apply_chat_template(MESSAGES)
    assert slow.all_special_ids == auto.all_special_ids


def test_directory_without_tokenizer_json(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> None:
    """vocab.json and merges.txt: transformers builds the tokenizer."""
    byte_level.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Hello, world!") == byte_level.encode("Hello, world!").ids


def test_wrap_tokenizer(directory: Directory, byte_level: tokenizers.Tokenizer) -> None:
    path = directory(tokenizer_config__json=CONFIG)
    ours = load_tokenizer(path)
    assert wrap_tokenizer(ours) is ours
    assert wrap_tokenizer(str(path)).encode("hi") == wrap_tokenizer(path).encode("hi") == ours.encode("hi")
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=byte_level, eos_token=SPECIAL[2], chat_template="{{ messages[0].content }}{{ eos_token }}"
    )
    wrapped = wrap_tokenizer(theirs)
    assert wrapped.eos_token_ids == (2,) and wrapped.decoder_style.kind == "byte_level"
    assert wrapped.apply_chat_template(MESSAGES, tokenize=False) == "hi<|im_end|>"
    for wrong in (None, 3, object(), byte_level):
        with pytest.raises(InvalidParameterError) as caught:
            wrap_tokenizer(wrong)
        assert caught.value.field == "tokenizer"


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file with this metadata and no tensors, by the reference writer."""
    writer = gguf.GGUFWriter(path, arch="llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_gguf_file(tmp_path: Path, byte_level: tokenizers.Tokenizer, kind: str) -> None:
    metadata = byte_level_metadata(byte_level, "gpt-2") if kind == "byte_level" else sentencepiece_metadata()
    metadata["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}"
    from_file = load_tokenizer(write_gguf(tmp_path / "model.gguf", metadata))
    from_memory = tokenizer_from_gguf_metadata(metadata)
    for text in TEXTS:
        assert from_file.encode(text) == from_memory.encode(text)
    assert from_file.apply_chat_template(MESSAGES)[0] == 1
    assert from_file.all_special_ids == from_memory.all_special_ids


def test_missing_and_damaged_files(directory: Directory, tmp_path: Path) -> None:
    def fails(path: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            load_tokenizer(path)
        assert caught.value.field == "tokenizer" and caught.value.remedy

    fails(tmp_path / "nowhere", "no tokenizer at")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(empty, "cannot load a tokenizer")
    (empty / "readme.txt").write_text("x")
    fails(empty / "readme.txt", "not a tokenizer")
    (empty / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab"')
    fails(empty, "tokenizer.json is damaged")
    (empty / "tokenizer.json").write_text("{}")
    fails(empty, "tokenizer.json is damaged")
    (empty / "tokenizer.json").unlink()
    (empty / "tokenizer.model").write_bytes(b"\x00garbage")
    fails(empty, "cannot load a tokenizer")
    path = directory(tokenizer_config__json="{broken")
    fails(path, r"tokenizer_config\.json is damaged")
    (path / "tokenizer_config.json").write_text("[1]")
    fails(path, "no JSON object")
    gguf_file = tmp_path / "model.gguf"
    gguf_file.write_bytes(b"GGUF\x03\x00\x00\x00garbage")
    with pytest.raises(CheckpointError):
        load_tokenizer(gguf_file)


def test_modes(directory: Directory, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        load_tokenizer(directory(), mode="fast")  # type: ignore[arg-type]
    assert caught.value.field == "tokenizer_mode"
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(UnsupportedFeatureError) as refused:
        load_tokenizer(tmp_path / "model.gguf", mode="slow")
    assert refused.value.field == "tokenizer_mode"


def test_loading_a_directory_imports_nothing_heavy(directory: Directory) -> None:
    """Cold start: no torch, transformers or jinja2 until they are needed."""
    path = directory(tokenizer_config__json={**CONFIG, "chat_template": "x"})
    code = (
        "import sys; from pathlib import Path; from tokenmill.tokenization import load_tokenizer;"
        f"tokenizer = load_tokenizer(Path({str(path)!r})); tokenizer.decode(tokenizer.encode('hi'));"
        "heavy = ('torch', 'transformers', 'jinja2', 'huggingface_hub', 'gguf');"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


@pytest.mark.real_model
def test_real_gguf(smollm2: Tokenizer, gemma3: Tokenizer) -> None:
    assert smollm2.has_chat_template and smollm2.vocab_size == 49152
    assert gemma3.vocab_size == 262144 and not gemma3.has_chat_template
