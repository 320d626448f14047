"""Option groups become options; every error ends in one line and the right exit code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from tokenmill.cli.command import command, examples
from tokenmill.errors import EngineError, InvalidParameterError, OutOfMemoryError


@dataclass(frozen=True, slots=True)
class Group:
    """Two options."""

    size: Annotated[int, typer.Option(min=1)] = 3
    names: Annotated[list[str] | None, typer.Option("--name")] = None


def run(body: Callable[[Group, str], None], *arguments: str) -> tuple[int, str, str]:
    app = typer.Typer(pretty_exceptions_enable=False)

    def work(word: Annotated[str, typer.Argument()] = "nothing", *, group: Group) -> None:
        """Do the work."""
        body(group, word)

    command(app, "work", epilog=examples(("Work", "work [now]"), ("Too late?", "work later")))(work)
    result = CliRunner().invoke(app, list(arguments), prog_name="work")
    return result.exit_code, result.stdout, result.stderr


def test_groups_arrive_with_their_defaults_and_values() -> None:
    seen: list[tuple[Group, str]] = []

    def body(group: Group, word: str) -> None:
        seen.append((group, word))

    assert run(body)[0] == 0
    assert run(body, "go", "--size", "5", "--name", "a", "--name", "b")[0] == 0
    assert seen == [(Group(3, None), "nothing"), (Group(5, ["a", "b"]), "go")]


def test_help_shows_the_groups_options_and_the_examples() -> None:
    code, out, _ = run(lambda group, word: None, "--help")
    assert code == 0
    for text in (
        "Do the work",
        "--size",
        "--name",
        "--debug",
        "Examples",
        "Work:",
        "work [now]",
        "Too late?",
        "work later",
    ):
        assert text in out
    assert "?:" not in out


def test_wrong_usage_is_exit_code_2() -> None:
    assert run(lambda group, word: None, "--size", "0")[0] == 2
    assert run(lambda group, word: None, "--no-such-option")[0] == 2


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InvalidParameterError("top_k is wrong.", remedy="Use 1."), 2, "error: top_k is wrong. Use 1.\n"),
        (EngineError("It\nbroke."), 1, "error: It broke.\n"),
        (OutOfMemoryError("Full."), 1, "error: Full.\n"),
        (RuntimeError("oh [no]"), 1, "error: unexpected RuntimeError: oh [no] (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(7), 7, ""),
    ],
)
def test_errors_end_in_one_line(error: BaseException, code: int, line: str) -> None:
    def fail(group: Group, word: str) -> None:
        raise error

    assert run(fail) == (code, "", line)


@pytest.mark.parametrize("error", [InvalidParameterError("wrong."), RuntimeError("broken")])
def test_debug_lets_the_error_through(error: Exception) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    def fail() -> None:
        raise error

    command(app, "fail", epilog="")(fail)
    result = CliRunner().invoke(app, ["--debug"])
    assert result.exception is error


def test_a_closed_pipe_is_quiet() -> None:
    code = (
        "import typer\n"
        "from tokenmill.cli.command import command\n"
        "app = typer.Typer()\n"
        "def work() -> None:\n"
        "    for _ in range(100_000):\n"
        "        print('a line', flush=True)\n"
        "command(app, 'work', epilog='')(work)\n"
        "app()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141
