"""What reaches the terminal: no control characters of a model, notes and errors on stderr only."""

from __future__ import annotations

import pytest

from tokenmill.cli.console import print_error, print_note, print_warning, safe_for_terminal, write_answer
from tokenmill.errors import UserError


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain", "plain"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[2Jgone\x07", "[2Jgone"),
        ("C1 \x9b31m", "C1 31m"),
        ("back\x08\x7f\r", "back"),
        ("日本語 é \U0001f642\u200d", "日本語 é \U0001f642\u200d"),
    ],
)
def test_control_characters_are_left_out(text: str, safe: str) -> None:
    assert safe_for_terminal(text) == safe


def test_answers_go_to_stdout_as_they_are_when_it_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    write_answer("a\x1b[0m")
    write_answer("")
    assert capsys.readouterr() == ("a\x1b[0m", "")


def test_notes_warnings_and_errors_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_note("a note with [markup] " + "x" * 200)
    print_warning("careful")
    print_error(UserError("Wrong\nthing.", remedy="Do [this]."))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "a note with [markup] " + "x" * 200, "careful", "error: Wrong thing. Do [this].",
    ]  # fmt: skip
