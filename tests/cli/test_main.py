"""The program as a whole: its help, its version, how light it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.cli.conftest import ROOT, Program
from tokenmill.cli.main import build_app
from tokenmill.version import __version__

COMMANDS = ["run", "chat", "serve", "inspect", "bench", "bench throughput", "bench latency", "build", "refit"]


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(build_app(), list(arguments), prog_name="tokenmill")
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.spec("A3")
def test_help_lists_every_command() -> None:
    code, out, _ = invoke("--help")
    assert code == 0
    for command in COMMANDS:
        assert command.split()[0] in out
    assert 'tokenmill run "Why is the sky blue?"' in out


@pytest.mark.spec("A3")
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_teaches_by_example(command: str) -> None:
    code, out, _ = invoke(*command.split(), "--help")
    assert code == 0
    if command != "bench":
        assert "Examples" in out
        assert f"tokenmill {command}" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_has_too_many_options(command: str) -> None:
    _, out, _ = invoke(*command.split(), "--help")
    assert sum(line.startswith(("│ --", "│ *  --")) for line in out.splitlines()) <= 25


def test_version() -> None:
    assert invoke("--version") == (0, f"tokenmill {__version__}\n", "")


def test_without_arguments_the_help_is_shown() -> None:
    code, out, err = invoke()
    assert code == 2
    assert "Usage: tokenmill" in out + err


def test_a_mistyped_command_is_corrected() -> None:
    code, _, err = invoke("serv")
    assert code == 2
    assert "serve" in err


@pytest.mark.spec("H1")
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_nothing_heavy(command: str) -> None:
    """Cold start: everything that takes long is imported when a command has something to do with it."""
    code = (
        "import sys\n"
        "from tokenmill.cli.main import main\n"
        f"sys.argv = ['tokenmill', *{command.split()!r}, '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'fastapi', 'gguf', 'huggingface_hub', 'yaml'}\n"
        "print('LOADED', sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_the_module_runs_as_a_program(process: Program) -> None:
    done = process("--version")
    assert (done.returncode, done.stdout) == (0, f"tokenmill {__version__}\n")


def test_an_unknown_model_is_one_line(program: Program) -> None:
    for arguments in (["run", "-m", "no/such/model/here", "hi"], ["inspect", "no/such/model/here"]):
        done = program(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert "no/such/model/here" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_debug_shows_where_an_error_comes_from(process: Program) -> None:
    done = process("inspect", "no/such/model/here", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ModelNotFoundError" in done.stderr


def test_wrong_values_are_refused_before_anything_is_loaded(tiny_model: Path) -> None:
    """In this process: nothing may reach the point where the model is opened."""
    model = os.fspath(tiny_model)
    for arguments, word in [
        (["run", model, "hi", "--temperature", "-1"], "temperature"),
        (["run", model, "hi", "--temperature", "nan"], "temperature"),
        (["run", model, "hi", "--top-p", "2"], "top_p"),
        (["run", model, "hi", "--dtype", "int3"], "dtype"),
        (["run", model, "hi", "--stop", ""], "stop"),
        (["run", model, "hi", "--config", "none.yaml"], "none.yaml"),
        (["run", model, "hi", "--raw", "--system", "x"], "--system"),
        (["run", model, "hi", "there"], "arguments"),
        (["run", "-m", model, "hi", "there"], "arguments"),
        (["run", model], "prompt is missing"),
        (["run", model, "-"], "no prompt"),
        (["chat", model, "--load", "none.json"], "none.json"),
        (["serve", model, "--load-format", "fast"], "load_format"),
        (["bench", "throughput", model, "--request-rate", "0"], "request_rate"),
        (["bench", "throughput", model, "--dataset", "none.jsonl"], "none.jsonl"),
        (["bench", "latency", model, "--report-json", "no/folder/r.json"], "folder"),
        (["inspect", model, "--max-seq-len", "1"], "max-seq-len"),
        (["inspect", model, "--dtype", "int3"], "dtype"),
    ]:
        code, out, err = invoke(*arguments)
        assert (code, out) == (2, ""), arguments
        assert word in err, arguments
        assert "Traceback" not in err
