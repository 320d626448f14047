"""The cache of built engines: found again, refused when damaged, replaced when the model changes, bounded in size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_checkpoint import write_tiny_model
from tokenmill.builder import build as builder
from tokenmill.config import LlmArgs
from tokenmill.executor import engine_source
from tokenmill.executor.engine_source import EngineTarget, open_engine
from tokenmill.program.engine_writing import new_folder

pytestmark = pytest.mark.spec("D1")

TARGET = EngineTarget("cpu", max_batch_size=4, max_num_tokens=64, max_seq_len=128)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


@pytest.fixture(autouse=True)
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Models that were built; all engines are cached, however small."""
    built: list[Path] = []
    build = builder.build

    def counted(model: Any, *arguments: Any, **options: Any) -> Any:
        built.append(model)
        return build(model, *arguments, **options)

    monkeypatch.setattr(builder, "build", counted)
    monkeypatch.setattr(engine_source, "SMALLEST_CACHED", 0)
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))
    return built


def arguments(model_dir: Path, **changes: Any) -> LlmArgs:
    return LlmArgs(model=model_dir, device="cpu", **changes)


def engines(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "engines").iterdir())


def test_the_second_start_reads_what_the_first_one_built(model_dir: Path, tmp_path: Path, builds: list[Path]) -> None:
    first = open_engine(arguments(model_dir), TARGET)
    second = open_engine(arguments(model_dir), TARGET)
    assert len(builds) == len(engines(tmp_path)) == 1
    assert second.program == first.program
    assert {name: bytes(content) for name, content in second.weights.items()}.keys() == first.weights.keys()


def test_other_sizes_need_no_other_engine(model_dir: Path, builds: list[Path]) -> None:
    open_engine(arguments(model_dir), TARGET)
    larger = open_engine(arguments(model_dir), TARGET._replace(max_num_tokens=256, max_batch_size=16))
    direct = engine_source.resized(larger, TARGET._replace(max_num_tokens=256, max_batch_size=16))
    assert len(builds) == 1
    assert (larger.config.limits.max_num_tokens, larger.config.limits.max_batch_size) == (256, 16)
    assert larger.program.arena_bytes > open_engine(arguments(model_dir), TARGET).program.arena_bytes
    assert direct is larger


@pytest.mark.parametrize("change", ["quantization", "dtype", "file"])
def test_another_model_or_format_is_another_engine(
    model_dir: Path, tmp_path: Path, builds: list[Path], change: str
) -> None:
    open_engine(arguments(model_dir), TARGET)
    options: dict[str, Any] = {"quantization": {"quantization": "int8"}, "dtype": {"dtype": "bfloat16"}}
    if change == "file":
        os.utime(model_dir / "model.safetensors", ns=(1, 1))
    open_engine(arguments(model_dir, **options.get(change, {})), TARGET)
    assert len(builds) == len(engines(tmp_path)) == 2


def test_a_damaged_engine_is_built_again(model_dir: Path, tmp_path: Path, builds: list[Path]) -> None:
    open_engine(arguments(model_dir), TARGET)
    (engine,) = engines(tmp_path)
    weights = engine / "rank0" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    open_engine(arguments(model_dir), TARGET)
    assert len(builds) == 2
    open_engine(arguments(model_dir), TARGET)
    assert len(builds) == 2


def test_the_engine_used_longest_ago_makes_room(
    model_dir: Path, tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: tuple[dict[str, Any], ...] = ({}, {"quantization": "int8"}, {"quantization": "q8_0"})
    for age, option in zip((30, 20), options, strict=False):
        open_engine(arguments(model_dir, **option), TARGET)
        newest = max(engines(tmp_path), key=lambda one: one.stat().st_mtime)
        os.utime(newest, (newest.stat().st_mtime - age, newest.stat().st_mtime - age))
    size = sum(sum(file.stat().st_size for file in one.rglob("*") if file.is_file()) for one in engines(tmp_path))
    open_engine(arguments(model_dir), TARGET)  # the first one is used again
    monkeypatch.setattr(engine_source, "CACHE_BYTES", size + 1000)
    open_engine(arguments(model_dir, **options[2]), TARGET)
    assert len(builds) == 3
    open_engine(arguments(model_dir), TARGET)
    assert len(builds) == 3, "the engine that was used again is still there"
    assert len(engines(tmp_path)) == 2


def test_what_a_killed_build_left_is_removed_and_what_another_one_writes_stays(tmp_path: Path) -> None:
    left = tmp_path / "cache" / "engines" / f".old.{'0' * 32}"
    (left / "rank0").mkdir(parents=True)
    with new_folder(tmp_path / "cache" / "engines" / "other") as written:
        engine_source._make_room(left.parent, 0)
        assert engines(tmp_path) == [written]


def test_without_a_cache_folder_engines_are_built(
    model_dir: Path, tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        open_engine(arguments(model_dir), TARGET).check_runnable()
    assert len(builds) == 2
