"""`tokenmill build` and `refit` ended by signals and full disks: exit codes, messages, and what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT, Program
from tests.cli.terminal import Terminal
from tokenmill import Engine
from tokenmill.program import engine_writing

pytestmark = pytest.mark.spec("D1", "A3")

FAST = ("--device", "cpu", "--opt-level", "1", "--config", "build.yaml")

HOLD = """
import os, resource, select, sys

if "MAX_FILE_BYTES" in os.environ:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["MAX_FILE_BYTES"]),) * 2)

def hold(event, arguments):
    if event == "open" and str(arguments[0]).endswith(os.environ["HOLD_AT"]) and not held:
        held.append(True)
        print("holding", file=sys.stderr, flush=True)
        while True:
            select.select([], [], [], 0.05)  # until the signal comes

held = []
sys.addaudithook(hold)
"""


@pytest.fixture
def environment(program_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The program stops where it opens the file that `HOLD_AT` names, and says so."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HOLD)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "build.yaml").write_text("capture: dispatch\n")
    return {**program_environment, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}", "HOLD_AT": "nowhere"}


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        ("model.safetensors", signal.SIGTERM, 143),
        ("rank0/weights.safetensors", signal.SIGTERM, 143),
        ("rank0/weights.safetensors", signal.SIGHUP, 129),
    ],
)
def test_a_signal_ends_a_build_and_leaves_nothing(
    environment: dict[str, str], tiny_model: Path, tmp_path: Path, moment: str, number: int, code: int
) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tokenmill", "build", str(tiny_model), "-o", "made/engine", *FAST],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path / "work",
        env={**environment, "HOLD_AT": moment},
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "holding\n"
        process.send_signal(number)
        assert process.wait(60) == code
        assert process.stderr.read() == ""
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["build.yaml"]


def test_ctrl_c_at_the_progress_bar_keeps_the_old_engine(
    environment: dict[str, str], program: Program, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "work")
    built = program("build", str(tiny_model), "-o", "engine", "--max-seq-len", "64", *FAST)
    assert built.returncode == 0, built.stderr
    arguments = ("build", str(tiny_model), "-o", "engine", "--max-seq-len", "128", *FAST)
    with Terminal(arguments, {**environment, "HOLD_AT": "rank0/weights.safetensors"}) as terminal:
        terminal.wait_for("holding")
        terminal.wait_for("Writing the engine")
        terminal.type("\x03")
        assert terminal.exit_code() == 130
        assert "Traceback" not in terminal.shown
    assert Engine.load("engine").config.limits.max_seq_len == 64
    assert sorted(path.name for path in Path().iterdir()) == ["build.yaml", "engine"]


def test_a_file_that_cannot_grow_is_one_line(environment: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tokenmill", "build", str(tiny_model), "-o", "made/engine", *FAST],
        capture_output=True,
        text=True,
        cwd=tmp_path / "work",
        env={**environment, "MAX_FILE_BYTES": "1000"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: The engine cannot be written to made/engine: File too large. ")
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["build.yaml"]


@pytest.mark.parametrize("command", ["build", "refit"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    program: Program, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    assert program("build", str(tiny_model), "-o", "engine", "--device", "cpu", "--opt-level", "1").returncode == 0
    (tmp_path / "file").write_text("text")

    def work(*_: object, **__: object) -> None:
        pytest.fail("the work has begun")

    monkeypatch.setattr("tokenmill.builder.build.build", work)
    monkeypatch.setattr(Engine, "refit", work)
    arguments = ("build", str(tiny_model)) if command == "build" else ("refit", "engine", "--weights", str(tiny_model))
    done = program(*arguments, "-o", "file/engine")
    assert done.returncode == 2
    assert "error: The engine cannot be written to file/engine: Not a directory" in done.stderr


def test_signals_have_their_usual_meaning_again_after_a_build(
    program: Program, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = engine_writing.new_folder
    monkeypatch.setattr(
        "tokenmill.program.package.new_folder",
        lambda path: seen.append(signal.getsignal(signal.SIGTERM)) or real(path),  # type: ignore[func-returns-value]
    )
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        done = program("build", str(tiny_model), "-o", "engine", "--device", "cpu", "--opt-level", "1")
        assert done.returncode == 0, done.stderr
        assert seen != [signal.SIG_DFL]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
