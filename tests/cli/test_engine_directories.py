"""Engine directories that this machine cannot use: from the command line, one line names the file and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Program
from tokenmill.builder.build import build
from tokenmill.program import engine_config

pytestmark = pytest.mark.spec("D1", "F1")


@pytest.fixture(scope="module")
def built(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = build(tiny_model, device="cpu", capture="dispatch", opt_level=1, max_seq_len=64, picture=False)
    return engine.save(tmp_path_factory.mktemp("built") / "engine")


def older(plain: dict[str, Any]) -> None:
    plain.update(format_version=1, tokenmill_version="0.0.1")


def other_architecture(plain: dict[str, Any]) -> None:
    plain["target"].update(architecture="s390x")


def other_instructions(plain: dict[str, Any]) -> None:
    plain["target"].update(instruction_set="amx_int8")


@pytest.mark.parametrize("command", [("run", "engine", "hello"), ("serve", "engine"), ("inspect", "engine")])
@pytest.mark.parametrize(
    ("change", "message", "remedy"),
    [
        (older, "version 1 of the engine format (made by tokenmill 0.0.1)", "Build it again: tokenmill build"),
        (other_architecture, "the architecture s390x; this one is", "Build it on this machine: tokenmill build"),
        (other_instructions, "processors with amx_int8; this one, ", "Build it on this machine: tokenmill build"),
    ],
)
def test_engines_of_another_version_or_machine(
    program: Program,
    built: Path,
    tiny_model: Path,
    tmp_path: Path,
    command: tuple[str, ...],
    change: Callable[[dict[str, Any]], None],
    message: str,
    remedy: str,
) -> None:
    shutil.copytree(built, tmp_path / "engine")
    path = tmp_path / "engine" / "config.json"
    plain = json.loads(path.read_text())
    change(plain)
    del plain["checksum"]
    path.write_text(json.dumps({**plain, "checksum": engine_config._own_checksum(plain)}))
    done = program(*command)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    for text in ("engine/config.json is of", message, f"{remedy} {tiny_model} -o DIRECTORY."):
        assert text in done.stderr


def test_an_engine_is_not_built_again(program: Program, built: Path) -> None:
    done = program("build", str(built), "-o", "engine")
    assert done.returncode == 2
    assert f"{built} is an engine, which is built already. Name the model's checkpoint" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_inspect_names_the_kernels_of_this_machine(program: Program, built: Path) -> None:
    report = json.loads(program("inspect", str(built), "--json").stdout)
    assert report["kernels"] in ("avx512_vnni", "avx_vnni", "avx2", "portable")
    assert f"cpu, here with {report['kernels']} kernels" in program("inspect", str(built)).stdout
