"""Engines survive a trip through a directory and a buffer bit by bit, and whatever is wrong is said by name."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.support.tiny_checkpoint import write_tiny_model
from tests.support.tiny_packages import tiny_package
from tokenmill.errors import EngineFileError, InvalidParameterError
from tokenmill.program import engine_config
from tokenmill.program import package as package_module
from tokenmill.program.checksums import CHUNK_BYTES, checksum
from tokenmill.program.engine_config import decode_config, encode_config, is_engine
from tokenmill.program.machine import Processor
from tokenmill.program.package import EnginePackage
from tokenmill.tokenization import load_tokenizer

pytestmark = pytest.mark.spec("D1")

PROGRAM = "rank0/program.json"
WEIGHTS = "rank0/weights.safetensors"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> EnginePackage:
    return tiny_package(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def engine(package: EnginePackage, tmp_path: Path) -> Path:
    return package.save(tmp_path / "engine")


def same(found: EnginePackage, expected: EnginePackage) -> None:
    assert found.program == expected.program
    assert found.config.model == expected.config.model
    assert found.config.limits == expected.config.limits
    assert found.weights.keys() == expected.weights.keys()
    for name, content in expected.weights.items():
        assert np.array_equal(found.weights[name][: content.nbytes], content), name
        assert not found.weights[name][content.nbytes :].any()


def test_a_saved_engine_is_loaded_as_it_was(package: EnginePackage, engine: Path) -> None:
    assert {str(path.relative_to(engine)) for path in engine.rglob("*") if path.is_file()} == {
        "config.json", PROGRAM, WEIGHTS, "graph.html", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
    }  # fmt: skip
    loaded = EnginePackage.load(engine)
    same(loaded, package)
    assert loaded.tokenizer_path == engine / "tokenizer"
    text = "the quick brown fox"
    assert package.tokenizer_path is not None
    assert load_tokenizer(loaded.tokenizer_path).encode(text) == load_tokenizer(package.tokenizer_path).encode(text)


def test_weights_are_mapped_aligned_and_read_only(engine: Path) -> None:
    for content in EnginePackage.load(engine).weights.values():
        assert not content.flags.writeable
        assert content.ctypes.data % 64 == 0
        assert isinstance(content, np.memmap)


def test_the_weights_file_is_readable_by_the_safetensors_library(package: EnginePackage, engine: Path) -> None:
    from safetensors.numpy import load_file

    found = load_file(engine / WEIGHTS)
    assert found.keys() == package.weights.keys()
    for name, content in package.weights.items():
        assert np.array_equal(found[name][: content.nbytes], content)


def test_a_buffer_is_an_engine_too(package: EnginePackage, tmp_path: Path) -> None:
    buffer = package.to_buffer()
    assert buffer == package.to_buffer()
    loaded = EnginePackage.from_buffer(memoryview(buffer))
    same(loaded, package)
    assert loaded.tokenizer_path is not None
    assert load_tokenizer(loaded.tokenizer_path).encode("fox")
    same(EnginePackage.load(loaded.save(tmp_path / "from_buffer")), package)
    with tarfile.open(fileobj=io.BytesIO(buffer)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    same(EnginePackage.load(tmp_path / "unpacked"), package)


def test_files_taken_out_of_a_buffer_go_with_the_engine(package: EnginePackage) -> None:
    loaded = EnginePackage.from_buffer(package.to_buffer())
    assert loaded.tokenizer_path is not None
    folder = loaded.tokenizer_path.parent
    copy = loaded.with_files({"timing.cache": b"{}"})
    del loaded
    assert folder.exists()
    del copy
    assert not folder.exists()


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_saving_replaces_an_engine_and_leaves_nothing_else(package: EnginePackage, engine: Path) -> None:
    loaded = EnginePackage.load(engine)
    loaded.with_files({"timing.cache": b"{}"}).save(engine)  # onto the files that it is mapped from
    same(EnginePackage.load(engine), package)
    assert (engine / "timing.cache").read_bytes() == b"{}"
    assert [path.name for path in engine.parent.iterdir()] == ["engine"]


def test_a_failed_save_leaves_the_old_engine(package: EnginePackage, engine: Path) -> None:
    broken = package.with_files({"graph.html": engine / "no such file"})
    with pytest.raises(InvalidParameterError, match="cannot be written"):
        broken.save(engine)
    same(EnginePackage.load(engine), package)
    assert [path.name for path in engine.parent.iterdir()] == ["engine"]


def test_what_is_no_engine_is_not_overwritten(package: EnginePackage, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for target in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.txt"):
        with pytest.raises(InvalidParameterError, match="is not an engine") as caught:
            package.save(target)
        assert caught.value.field == "output"
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


# ---- reading what is wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", PROGRAM, WEIGHTS, "graph.html", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "longer", "first", "middle", "last"])
def test_damage_is_found_and_the_file_named(engine: Path, name: str, damage: str) -> None:
    path = engine / name
    content = bytearray(path.read_bytes())
    at = {"first": 0, "middle": len(content) // 2, "last": len(content.rstrip()) - 1}
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "longer":
        path.write_bytes(content + b"x")
    else:
        content[at[damage]] ^= 0x10
        path.write_bytes(content)
    with pytest.raises(EngineFileError) as caught:
        EnginePackage.load(engine)
    assert str(path) in str(caught.value)
    assert caught.value.remedy
    assert caught.value.field == "engine"


def test_every_flipped_byte_of_the_configuration_is_harmless_or_found(package: EnginePackage, engine: Path) -> None:
    """White space may change; no value may."""
    content = (engine / "config.json").read_bytes()
    expected = decode_config(content, "config")
    num_refused = 0
    for index in range(0, len(content), 7):
        changed = bytearray(content)
        changed[index] ^= 0x02
        try:
            assert decode_config(bytes(changed), "config") == expected
        except EngineFileError:
            num_refused += 1
    assert num_refused > len(content) // 7 // 2


def test_without_verification_sizes_are_still_compared(engine: Path) -> None:
    content = bytearray((engine / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (engine / WEIGHTS).write_bytes(content)
    EnginePackage.load(engine, verify=False)
    (engine / WEIGHTS).write_bytes(content[:-64])
    with pytest.raises(EngineFileError, match="bytes instead of"):
        EnginePackage.load(engine, verify=False)


def rewrite_config(engine: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change config.json and give it a right checksum again."""
    plain = msgspec.to_builtins(decode_config((engine / "config.json").read_bytes(), "config"))
    change(plain)
    plain["checksum"] = engine_config._own_checksum(plain)
    (engine / "config.json").write_text(json.dumps(plain))


def set_target(**values: str) -> Callable[[dict[str, Any]], None]:
    return lambda plain: plain["target"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda plain: plain.update(format_version=99, tokenmill_version="9.9"),
            r"version 99 .*made by tokenmill 9\.9",
        ),
        (lambda plain: plain.update(format="other"), "not the configuration of an engine"),
        (lambda plain: plain.pop("dtype"), "missing required field `dtype`"),
        (lambda plain: plain.update(surprise=1), "unknown field `surprise`"),
        (lambda plain: plain["limits"].update(max_seq_len="long"), "Expected `int`"),
        (lambda plain: plain["files"].pop(PROGRAM), "does not list rank0/program.json"),
        (lambda plain: plain["files"].update({"tokenizer/../../x": plain["files"][PROGRAM]}), "unknown file"),
        (lambda plain: plain["files"].update({"run.sh": plain["files"][PROGRAM]}), "unknown file 'run.sh'"),
        (lambda plain: plain.update(tokenizer="/etc/passwd"), "says that the tokenizer is at '/etc/passwd'"),
        (set_target(architecture="s390x"), "architecture s390x"),
        (set_target(instruction_set="avx1024"), "processors with avx1024"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(
    engine: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    rewrite_config(engine, change)
    with pytest.raises(EngineFileError, match=message) as caught:
        EnginePackage.load(engine)
    assert str(engine / "config.json") in str(caught.value)
    assert "uild" in str(caught.value)


def test_an_engine_for_a_better_processor_says_what_is_missing(
    package: EnginePackage, monkeypatch: pytest.MonkeyPatch, engine: Path
) -> None:
    rewrite_config(engine, set_target(architecture="x86_64", instruction_set="avx512_vnni"))
    old = Processor(architecture="x86_64", model="Old CPU", features=frozenset({"avx2", "fma", "f16c", "avx512f"}))
    monkeypatch.setattr(package_module, "read_processor", lambda: old)
    with pytest.raises(EngineFileError, match=r"Old CPU, has avx2, portable \(.*avx512_vnni missing\)") as caught:
        EnginePackage.load(engine)
    assert caught.value.remedy == "Build it on this machine: tokenmill build tiny -o DIRECTORY."


@pytest.mark.parametrize("path", ["nothing", "file", "folder"])
def test_what_is_no_engine_directory_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert not is_engine(tmp_path / path)
    with pytest.raises(EngineFileError, match=path):
        EnginePackage.load(tmp_path / path)


def test_a_model_directory_is_not_taken_for_an_engine(tmp_path: Path, engine: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    assert not is_engine(model)
    assert is_engine(engine)
    with pytest.raises(EngineFileError, match="not the configuration of an engine"):
        EnginePackage.load(model)


# ---- buffers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 511, 512, 5000])
def test_truncated_buffers_are_refused(package: EnginePackage, length: int) -> None:
    with pytest.raises(EngineFileError, match="buffer"):
        EnginePackage.from_buffer(package.to_buffer()[:length])


def test_buffers_cut_anywhere_are_refused(package: EnginePackage) -> None:
    buffer = package.to_buffer()
    end = buffer.index(b"config.json") + 512  # behind the last file's header only fillers may be missing
    for length in range(0, end, len(buffer) // 40):
        with pytest.raises(EngineFileError):
            EnginePackage.from_buffer(buffer[:length])


def test_a_flipped_byte_in_a_buffer_is_found(package: EnginePackage) -> None:
    buffer = bytearray(package.to_buffer())
    with tarfile.open(fileobj=io.BytesIO(bytes(buffer))) as archive:
        member = archive.getmember(WEIGHTS)
    buffer[member.offset_data + member.size - 1000] ^= 0x40
    with pytest.raises(EngineFileError, match=r"rank0/weights.safetensors of the engine in the buffer was changed"):
        EnginePackage.from_buffer(bytes(buffer))


def test_random_damage_is_refused_or_harmless(package: EnginePackage) -> None:
    """Fillers of the archive may change; nothing else that is wrong may go unnoticed, or end in another error."""
    buffer, rng = package.to_buffer(), np.random.default_rng(0)
    num_refused = 0
    for _ in range(200):
        damaged = bytearray(buffer)
        for _ in range(rng.integers(1, 4)):
            in_header = rng.random() < 0.5
            position = (
                rng.integers(len(buffer) // 512) * 512 + rng.integers(512) if in_header else rng.integers(len(buffer))
            )
            damaged[position] = rng.integers(256)
        length = rng.integers(len(damaged)) if rng.random() < 0.2 else len(damaged)
        try:
            assert EnginePackage.from_buffer(bytes(damaged[:length])).program == package.program
        except EngineFileError:
            num_refused += 1
    assert num_refused > 150


def test_archives_with_links_are_refused() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("config.json")
        entry.type = tarfile.SYMTYPE
        entry.linkname = "/etc/passwd"
        archive.addfile(entry)
    with pytest.raises(EngineFileError, match="no whole file"):
        EnginePackage.from_buffer(stream.getvalue())


# ---- weights against the program -------------------------------------------------------------------------------------


def resave(package: EnginePackage, folder: Path, weights: dict[str, Any]) -> Path:
    return dataclasses.replace(package, weights=weights).save(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "lacks the weight 'model.norm.weight'"),
        (lambda weights: weights.update(extra=np.zeros(64, np.uint8)), "'extra', which is no weight"),
        (
            lambda weights: weights.update({"model.norm.weight": np.zeros(32, np.uint8)}),
            "'model.norm.weight' has 64 bytes instead of 128",
        ),
    ],
)
def test_weights_that_do_not_fit_the_program_are_refused(
    package: EnginePackage, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    weights = dict(package.weights)
    change(weights)
    with pytest.raises(EngineFileError, match=message):
        EnginePackage.load(resave(package, tmp_path / "engine", weights))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{}", "not that of an engine's weights"),
        (b"nonsense", "not JSON"),
        (b'{"__metadata__":{"format":"tokenmill-engine-weights"},"a":{"dtype":"F32"}}', "entry of 'a'"),
        (
            b'{"__metadata__":{"format":"tokenmill-engine-weights"},"a":{"dtype":"U8","shape":[64],"data_offsets":[0,'
            b"1073741824]}}",
            "entry of 'a'",
        ),
        (
            b'{"__metadata__":{"format":"tokenmill-engine-weights"},"a":{"dtype":"U8","shape":[-64],"data_offsets":[64,'
            b"0]}}",
            "entry of 'a'",
        ),
    ],
)
def test_bad_headers_of_weights_are_refused(engine: Path, header: bytes, message: str) -> None:
    content = struct.pack("<Q", len(header)) + header + bytes(64)
    (engine / WEIGHTS).write_bytes(content)
    record = {"num_bytes": len(content), "checksum": checksum(np.frombuffer(content, np.uint8))}
    rewrite_config(engine, lambda plain: plain["files"].update({WEIGHTS: record}))
    with pytest.raises(EngineFileError, match=message):
        EnginePackage.load(engine)


def test_a_header_longer_than_the_file_is_refused(engine: Path) -> None:
    content = struct.pack("<Q", 2**63) + bytes(64)
    (engine / WEIGHTS).write_bytes(content)
    record = {"num_bytes": len(content), "checksum": checksum(np.frombuffer(content, np.uint8))}
    rewrite_config(engine, lambda plain: plain["files"].update({WEIGHTS: record}))
    with pytest.raises(EngineFileError, match="does not fit the file"):
        EnginePackage.load(engine)


def test_a_stripped_engine_loads_and_says_that_it_cannot_run(package: EnginePackage, tmp_path: Path) -> None:
    constants = {weight.name for weight in package.program.weights if not weight.parts}
    stripped = dataclasses.replace(
        package,
        config=msgspec.structs.replace(package.config, stripped=True),
        weights={name: package.weights[name] for name in constants},
    )
    folder = stripped.save(tmp_path / "stripped")
    loaded = EnginePackage.load(folder)
    assert loaded.weights.keys() == constants
    with pytest.raises(EngineFileError, match="without weights"):
        loaded.check_runnable()
    package.check_runnable()


# ---- pieces ----------------------------------------------------------------------------------------------------------


def test_the_checksum_is_what_the_document_says() -> None:
    content = np.random.default_rng(0).integers(0, 256, 2 * CHUNK_BYTES + 17, np.uint8)
    chunks = [content[start : start + CHUNK_BYTES].tobytes() for start in range(0, len(content), CHUNK_BYTES)]
    digest = hashlib.sha256(b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)).hexdigest()
    assert checksum(content) == f"sha256-4m:{digest}"
    assert checksum(content[:0]) == f"sha256-4m:{hashlib.sha256(b'').hexdigest()}"
    changed = content.copy()
    changed[CHUNK_BYTES] ^= 1
    assert checksum(changed) != checksum(content)


def test_a_configuration_survives_its_text(package: EnginePackage) -> None:
    assert decode_config(encode_config(package.config), "x") == package.config


def test_an_engine_can_be_moved(package: EnginePackage, engine: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "engine"
    shutil.move(engine, moved)
    same(EnginePackage.load(moved), package)
