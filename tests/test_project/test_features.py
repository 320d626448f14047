"""docs/features.md tells the truth: every row is there, and what it says works has tests marked with the row."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support.documents import table_rows
from tests.support.source_tree import ROOT

NUM_ROWS = {"A": 6, "B": 6, "C": 7, "D": 6, "E": 8, "F": 4, "G": 3, "H": 6}
STATES = ("works", "partly", "not yet")


def feature_rows() -> dict[str, tuple[str, list[str], str]]:
    """Row -> (state, test files, what is missing)."""
    rows = {}
    for row, _what, state, _name, tests, missing in table_rows((ROOT / "docs/features.md").read_text("utf-8"), 6):
        assert row not in rows, f"{row} stands there twice"
        rows[row] = (state, re.findall(r"`([^`]+)`", tests), missing)
    return rows


def marked_rows(path: Path) -> set[str]:
    """The rows that the tests of one file are marked with."""
    rows: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.spec":
            rows.update(argument.value for argument in node.args if isinstance(argument, ast.Constant))
    return rows


def test_every_row_is_there() -> None:
    expected = [f"{letter}{number}" for letter, count in NUM_ROWS.items() for number in range(1, count + 1)]
    assert list(feature_rows()) == expected


def test_what_works_is_proven_by_marked_tests() -> None:
    wrong = []
    for row, (state, files, missing) in feature_rows().items():
        if state not in STATES:
            wrong.append(f"{row}: unknown state '{state}'")
        if (state == "not yet") == bool(files):
            wrong.append(f"{row} is '{state}' and names {files or 'no test'}")
        if (state == "partly") != bool(missing):
            wrong.append(f"{row} is '{state}' and says that this is missing: '{missing}'")
        wrong += [f"{row}: there is no {file}" for file in files if not (ROOT / file).is_file()]
        wrong += [
            f"{row}: {file} has no test marked with it"
            for file in files
            if (ROOT / file).is_file() and row not in marked_rows(ROOT / file)
        ]
    assert not wrong, "\n".join(["", *wrong])


def test_every_marked_test_is_named() -> None:
    rows = feature_rows()
    forgotten = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        file = path.relative_to(ROOT).as_posix()
        for row in sorted(marked_rows(path)):
            if row not in rows:
                forgotten.append(f"{file} is marked with {row}, which is no row")
            elif file not in rows[row][1]:
                forgotten.append(f"{row} does not name {file}")
    assert not forgotten, "\n".join(["", *forgotten])
