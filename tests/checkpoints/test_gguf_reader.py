"""`GgufFile` against the gguf library's reader and writer, and against damaged files."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints.gguf_files import QUANTIZABLE, add_tensor, finish
from tokenmill.checkpoints.gguf_reader import GgufFile
from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.errors import CheckpointError, ModelNotFoundError

RANDOM = np.random.default_rng(7)


def write_sample(path: Path, alignment: int | None = None) -> dict[str, np.ndarray]:
    """A file with every kind of metadata and a few tensors; gives the tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -100)
    writer.add_uint16("a.u16", 60_000)
    writer.add_int16("a.i16", -30_000)
    writer.add_uint32("a.u32", 4_000_000_000)
    writer.add_int32("a.i32", -2_000_000_000)
    writer.add_uint64("a.u64", 2**63 + 1)
    writer.add_int64("a.i64", -(2**62))
    writer.add_float32("a.f32", 0.25)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "Ġüñí\n\U0001f600")
    writer.add_array("a.strings", ["", "x", "日本"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.5])
    tensors = {
        "vector": RANDOM.normal(size=(7,)).astype(np.float32),
        "matrix": RANDOM.normal(size=(3, 64)).astype(np.float32),
        "cube": RANDOM.normal(size=(2, 3, 32)).astype(np.float32),
    }
    add_tensor(writer, "vector", tensors["vector"], "F32")
    add_tensor(writer, "matrix", tensors["matrix"], "Q8_0")
    add_tensor(writer, "cube", tensors["cube"], "F16")
    finish(writer)
    return tensors


@pytest.mark.parametrize("alignment", [None, 128])
def test_metadata_and_tensors_equal_what_was_written(tmp_path: Path, alignment: int | None) -> None:
    tensors = write_sample(tmp_path / "sample.gguf", alignment)
    file = GgufFile(tmp_path / "sample.gguf")
    assert file.version == 3
    scalars = {key: value for key, value in file.metadata.items() if key in _SCALARS}
    assert scalars == _SCALARS
    assert file.metadata["a.strings"] == ["", "x", "日本"]
    assert file.metadata["a.ints"].tolist() == [1, -2, 3]
    assert file.metadata["a.floats"].tolist() == [0.5, -1.5]
    assert {name: info.shape for name, info in file.tensors.items()} == {n: a.shape for n, a in tensors.items()}
    assert [info.ggml_type for info in file.tensors.values()] == ["F32", "Q8_0", "F16"]
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "sample.gguf").tensors}
    for name, info in file.tensors.items():
        assert (info.offset, info.nbytes) == (reference[name].data_offset, reference[name].n_bytes)
    assert torch.equal(file.read("vector"), torch.from_numpy(tensors["vector"]))
    assert torch.equal(file.read("cube"), torch.from_numpy(tensors["cube"]).half().float())


_SCALARS: dict[str, Any] = {
    "general.architecture": "llama",
    "a.u8": 200,
    "a.i8": -100,
    "a.u16": 60_000,
    "a.i16": -30_000,
    "a.u32": 4_000_000_000,
    "a.i32": -2_000_000_000,
    "a.u64": 2**63 + 1,
    "a.i64": -(2**62),
    "a.f32": 0.25,
    "a.f64": 0.1,
    "a.bool": True,
    "a.text": "Ġüñí\n\U0001f600",
}


@pytest.mark.spec("D6")
@pytest.mark.parametrize("kind", QUANTIZABLE)
def test_every_type_that_can_be_written_reads_as_the_reference_does(tmp_path: Path, kind: str) -> None:
    values = RANDOM.normal(size=(37, 512)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    add_tensor(writer, "weight", values, kind)
    finish(writer)
    (reference,) = gguf.GGUFReader(tmp_path / "one.gguf").tensors
    expected = dequantize(reference.data, reference.tensor_type)
    read = GgufFile(tmp_path / "one.gguf").read("weight")
    assert read.shape == (37, 512)
    assert read.dtype == torch.float32
    np.testing.assert_array_equal(read.numpy(), expected)
    # the blocks still resemble what went in: the rows were not mixed up on both sides alike
    assert np.corrcoef(read.numpy().ravel(), values.ravel())[0, 1] > 0.6


def test_read_gives_a_copy_that_may_be_written(tmp_path: Path) -> None:
    tensors = write_sample(tmp_path / "sample.gguf")
    file = GgufFile(tmp_path / "sample.gguf")
    file.read("vector").zero_()
    assert torch.equal(file.read("vector"), torch.from_numpy(tensors["vector"]))


def test_every_truncation_is_noticed_or_harmless(tmp_path: Path) -> None:
    write_sample(tmp_path / "sample.gguf")
    whole = (tmp_path / "sample.gguf").read_bytes()
    intact = GgufFile(tmp_path / "sample.gguf")
    last_byte = max(info.offset + info.nbytes for info in intact.tensors.values())
    cut = tmp_path / "cut.gguf"
    for size in range(len(whole)):
        cut.write_bytes(whole[:size])
        if size < last_byte:
            with pytest.raises(CheckpointError, match=r"cut\.gguf") as caught:
                GgufFile(cut)
            assert caught.value.field == "model"
            assert caught.value.remedy
        else:  # only padding is gone
            assert torch.equal(GgufFile(cut).read("cube"), intact.read("cube"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_checkpoint_errors_only(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "sample.gguf"
    if not path.exists():
        write_sample(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    try:
        file = GgufFile(damaged)
        for name in file.tensors:
            file.read(name)
    except CheckpointError as error:
        assert str(damaged) in str(error)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _header(num_tensors: int, num_keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


_DAMAGED = {
    "empty": (b"", "letters GGUF"),
    "not gguf": (b"PK\x03\x04" + bytes(100), "letters GGUF"),
    "version 1": (_header(0, 0, version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many tensors": (_header(2**60, 0) + bytes(64), "twice|blocks|ends|wanted"),
    "many keys": (_header(0, 2**60), "wanted"),
    "long string": (_header(0, 1) + struct.pack("<Q", 2**62), "inside a string"),
    "string past 64 bits": (_header(0, 1) + struct.pack("<Q", 2**64 - 1) + bytes(64), "inside a string"),
    "long array": (_header(0, 1) + _string("k") + struct.pack("<IIQ", 9, 4, 2**60) + bytes(64), "wanted"),
    "long string array": (_header(0, 1) + _string("k") + struct.pack("<IIQ", 9, 8, 2**60) + bytes(64), "wanted"),
    "nested array": (_header(0, 1) + _string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64), "unknown type"),
    "unknown value type": (_header(0, 1) + _string("k") + struct.pack("<I", 77) + bytes(64), "unknown type 77"),
    "key twice": (_header(0, 2) + (_string("k") + struct.pack("<IB", 0, 1)) * 2, "'k' appears twice"),
    "not utf-8": (_header(0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(64), "not UTF-8"),
    "five dimensions": (_header(1, 0) + _tensor("t", (1, 1, 1, 1, 1), 0, 0), "5 dimensions"),
    "huge dimensions": (_header(1, 0) + _tensor("t", (2**63, 2**63), 0, 0) + bytes(64), "ends at byte"),
    "zero dimension": (_header(1, 0) + _tensor("t", (0, 4), 0, 0) + bytes(64), "cannot be made"),
    "half a block": (_header(1, 0) + _tensor("t", (48,), 2, 0) + bytes(64), "Q4_0 blocks"),
    "unknown tensor type": (_header(1, 0) + _tensor("t", (4,), 999, 0) + bytes(64), "unknown type 999"),
    "offset past the end": (_header(1, 0) + _tensor("t", (4,), 0, 2**40) + bytes(64), "ends at byte"),
    "not aligned": (_header(1, 0) + _tensor("t", (4,), 0, 4) + bytes(99), "aligned"),
    "tensor twice": (_header(2, 0) + _tensor("t", (4,), 0, 0) * 2 + bytes(99), "'t' appears twice"),
    "overlap": (_header(2, 0) + _tensor("t", (4,), 0, 0) + _tensor("u", (4,), 0, 0) + bytes(99), "overlap"),
    "bad alignment": (_header(0, 1) + _string("general.alignment") + struct.pack("<II", 4, 0), "power of two"),
}


@pytest.mark.parametrize("what", _DAMAGED)
def test_damage_is_named_without_a_large_allocation(tmp_path: Path, what: str) -> None:
    content, text = _DAMAGED[what]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=text) as caught:
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_version_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "two.gguf"
    head = _header(1, 0, version=2) + _tensor("t", (4,), 0, 0)
    path.write_bytes(head + bytes(-len(head) % 32) + struct.pack("<4f", 1, 2, 3, 4))
    assert GgufFile(path).read("t").tolist() == [1, 2, 3, 4]


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.gguf"):
        GgufFile(tmp_path / "nothing.gguf")
    with pytest.raises(CheckpointError, match="Cannot read"):
        GgufFile(tmp_path)


def test_type_without_dequantization_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q8k.gguf"
    head = _header(1, 0) + _tensor("t", (256,), int(gguf.GGMLQuantizationType.Q8_K), 0)
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(292))
    with pytest.raises(CheckpointError, match="Q8_K, which cannot be dequantized"):
        GgufFile(path).read("t")


@pytest.mark.real_model
@pytest.mark.parametrize(("alias", "kinds"), [("smollm2:135m", {"Q4_1"}), ("gemma3:270m", {"Q4_K", "Q5_0", "Q6_K"})])
def test_real_files_read_as_the_reference_does(alias: str, kinds: set[str]) -> None:
    try:
        path = resolve_model(alias, show_progress=False)
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    file = GgufFile(path)
    reference = gguf.GGUFReader(path)
    assert set(file.metadata) == {key for key in reference.fields if not key.startswith("GGUF.")}
    for key, value in file.metadata.items():
        theirs = reference.fields[key].contents() if key != "tokenizer.ggml.tokens" else value
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == theirs, key
    assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
    seen: set[str] = set()
    for tensor in reference.tensors:
        info = file.tensors[tensor.name]
        assert info.shape == tuple(tensor.shape[::-1].tolist())
        assert info.ggml_type == tensor.tensor_type.name
        if len(info.shape) == 2 and info.ggml_type not in seen and info.nbytes < 10 << 20:
            seen.add(info.ggml_type)
            read = file.read(tensor.name).numpy()
            np.testing.assert_array_equal(read, dequantize(tensor.data, tensor.tensor_type))
    assert kinds <= seen
