"""Tiny models on disk and a way to run the program, for the tests of the commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.support.tiny_checkpoint import write_tiny_model
from tokenmill.cli.main import build_app

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can chat."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-chat", max_positions=8192, weight_scale=0.02)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without chat template, with a context of 64 tokens."""
    return write_tiny_model(
        tmp_path_factory.mktemp("models") / "tiny-base", chat_template=False, max_positions=64, weight_scale=0.02
    )


@pytest.fixture(scope="session")
def program_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of the program under test: this source tree, a cache folder of its own with the kernels that are
    compiled already, no terminal width of ours."""
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "FORCE_COLOR")}
    cache = tmp_path_factory.mktemp("cache")
    for name in ("native", "captures"):
        (cache / name).symlink_to(Path(os.environ["TOKENMILL_CACHE"]) / name, target_is_directory=True)
    return {**kept, "PYTHONPATH": str(ROOT), "TOKENMILL_CACHE": str(cache), "TERM": "xterm", "OMP_NUM_THREADS": "1"}


SLOWLY = """
import time
from tokenmill.engine.core import EngineCore
advance = EngineCore.advance
EngineCore.advance = lambda engine: (time.sleep(0.02), advance(engine))[1]
"""


@pytest.fixture
def slow_environment(program_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The same for a program whose answers take so long that one can interrupt them."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SLOWLY)
    return {**program_environment, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


@dataclass(frozen=True)
class Outcome:
    """What a run of the program left."""

    returncode: int
    stdout: str
    stderr: str


Program = Callable[..., Outcome]


@pytest.fixture
def program(program_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """Runs the program in this process (torch is loaded once), in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENMILL_CACHE", program_environment["TOKENMILL_CACHE"])

    def run(*arguments: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["tokenmill", *arguments])
        result = CliRunner().invoke(build_app(), list(arguments), input=stdin, prog_name="tokenmill")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    num_threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(num_threads)


@pytest.fixture
def process(program_environment: dict[str, str], tmp_path: Path) -> Program:
    """Runs `python -m tokenmill` in a process and a folder of its own."""

    def run(*arguments: str, stdin: str = "") -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "tokenmill", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=program_environment,
            timeout=120,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run
