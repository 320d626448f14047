"""Hugging Face directories written by `transformers` and `safetensors`, whole and broken."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.checkpoints.gguf_files import tiny_model
from tokenmill.checkpoints.base import open_checkpoint
from tokenmill.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.mark.spec("D6")
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "60KB"])
def test_saved_models_come_back(tmp_path: Path, model_type: str, max_shard_size: str) -> None:
    model = tiny_model(model_type, tie_word_embeddings=False)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX).exists() == (max_shard_size == "60KB")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.path, checkpoint.quantization) == ("safetensors", tmp_path, "none")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {key: checkpoint.hf_config[key] for key in saved if key != "eos_token_id"} == {
        key: value for key, value in saved.items() if key != "eos_token_id"
    }
    expected = model.state_dict()
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors()}
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert (tensor.shape, tensor.dtype) == (tuple(expected[name].shape), torch.float32)
        assert torch.equal(tensor.load(), expected[name])
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in expected.values())


def write_config(directory: Path, **config: Any) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))


def write_shards(directory: Path) -> None:
    write_config(directory)
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, directory / "one.safetensors")
    save_file({"c": torch.full((4,), 2.0)}, directory / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floating_point_types(tmp_path: Path, dtype: torch.dtype) -> None:
    write_config(tmp_path)
    original = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"a": original}, tmp_path / "model.safetensors")
    (tensor,) = open_checkpoint(tmp_path).tensors()
    assert tensor.dtype == dtype
    assert torch.equal(tensor.load(), original)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_other_types_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    write_config(tmp_path)
    save_file({"a.weight": torch.zeros(4).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor 'a\.weight' has the unsupported type"
    ) as caught:
        list(open_checkpoint(tmp_path).tensors())
    assert caught.value.field == "model"


def test_several_files_without_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / INDEX).unlink()
    assert sorted(tensor.name for tensor in open_checkpoint(tmp_path).tensors()) == ["a", "b", "c"]
    save_file({"a": torch.ones(2)}, tmp_path / "three.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is both in one\.safetensors and in three\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, None),
        (2, None, 2),
        (None, 3, 3),
        (2, 2, 2),
        (2, [2, 7], [2, 7]),
        ([1, 106], 1, [1, 106]),
        (5, [7, 8], [5, 7, 8]),
    ],
)
def test_end_ids_of_both_configurations_count(tmp_path: Path, config: Any, generation: Any, expected: Any) -> None:
    write_config(tmp_path, eos_token_id=config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).hf_config["eos_token_id"] == expected


def test_quantization_method_is_told(tmp_path: Path) -> None:
    write_config(tmp_path, quantization_config={"quant_method": "awq", "bits": 4})
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).quantization == "awq"


def _rewrite_index(directory: Path, **weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _truncate(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


def _only_pytorch(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"weights")


def _no_weights(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()


_BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), r"has no config\.json"),
    "config is a directory": (
        lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()),
        r"has no config\.json",
    ),
    "config not json": (lambda d: (d / "config.json").write_text("{'a': 1}"), r"config\.json is not JSON"),
    "config not utf-8": (lambda d: (d / "config.json").write_bytes(b'{"a": "\xff"}'), r"config\.json is not JSON"),
    "config too deep": (lambda d: (d / "config.json").write_text("[" * 200_000), r"config\.json is not JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), r"config\.json holds no JSON object"),
    "no model_type": (lambda d: (d / "config.json").write_text("{}"), r"'model_type' is None"),
    "model_type a number": (lambda d: write_config(d, model_type=7), r"'model_type' is 7"),
    "eos a text": (lambda d: write_config(d, eos_token_id="</s>"), r"'eos_token_id' is '</s>'"),
    "generation not json": (lambda d: (d / "generation_config.json").write_text(""), r"generation_config\.json is not"),
    "generation eos bad": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": [true]}'),
        r"generation_config\.json: 'eos_token_id' is \[True\]",
    ),
    "missing shard": (lambda d: (d / "two.safetensors").unlink(), r"two\.safetensors is missing"),
    "tensor not in shard": (lambda d: _rewrite_index(d, c="one.safetensors"), r"'c' is in one\.safetensors, but it is"),
    "index leaves the folder": (lambda d: _rewrite_index(d, a="../one.safetensors"), r"'\.\./one\.safetensors', which"),
    "index names a number": (lambda d: _rewrite_index(d, a=1), r"into 1, which is no file name"),
    "index without map": (lambda d: (d / INDEX).write_text("{}"), r"has no 'weight_map'"),
    "index not json": (lambda d: (d / INDEX).write_text("nope"), r"index\.json is not JSON"),
    "truncated body": (lambda d: _truncate(d / "one.safetensors", 1), r"one\.safetensors cannot be read"),
    "truncated header": (lambda d: _truncate(d / "two.safetensors", 40), r"two\.safetensors cannot be read"),
    "empty file": (lambda d: (d / "two.safetensors").write_bytes(b""), r"two\.safetensors cannot be read"),
    "huge header": (
        lambda d: (d / "two.safetensors").write_bytes(struct.pack("<Q", 2**62) + bytes(64)),
        r"two\.safetensors cannot be read",
    ),
    "only pytorch files": (_only_pytorch, r"only as pytorch_model\.bin.*Convert them to safetensors"),
    "no weights": (_no_weights, r"holds no \*\.safetensors"),
}


@pytest.mark.parametrize("what", _BROKEN)
def test_broken_directories_are_named(tmp_path: Path, what: str) -> None:
    write_shards(tmp_path)
    damage, text = _BROKEN[what]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=text) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.field == "model"
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_weights_file_alone_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="Give the directory"):
        open_checkpoint(tmp_path / name)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    write_config(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_checkpoint(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_give_checkpoint_errors_only(tmp_path: Path, data: st.DataObject) -> None:
    whole = tmp_path / "whole"
    if not whole.exists():
        save_file({"a": torch.ones(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, whole)
        write_config(tmp_path)
    content = bytearray(whole.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "model.safetensors").write_bytes(content)
    try:
        for tensor in open_checkpoint(tmp_path).tensors():
            tensor.load()
    except CheckpointError as error:
        assert "model.safetensors" in str(error)
