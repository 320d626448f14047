"""docs/features.md tells the truth: every row is there, and what it says works has tests marked with the row."""

from __future__ import annotations

import re

from tests.support.documents import table_rows
from tests.support.feature_marks import files_by_row, marked_rows
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


def test_public_names_exist() -> None:
    """Of rows that have something: the last word of each name stands in the sources, or it is a file."""
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "tokenmill").rglob("*.py"))
    words = set(re.findall(r"\w+", sources)) | {path.stem for path in (ROOT / "tokenmill").rglob("*.py")}
    wrong = []
    for row, _what, state, names, *_ in table_rows((ROOT / "docs/features.md").read_text("utf-8"), 6):
        for name in re.findall(r"`([^`]+)`", names):
            last = re.findall(r"\w+", name.partition("(")[0])[-1]
            if state != "not yet" and last not in words and not (ROOT / name).is_file():
                wrong.append(f"{row} names {name}")
    assert not wrong, "\n".join(["", *wrong])


def test_every_marked_test_is_named() -> None:
    rows = feature_rows()
    forgotten = []
    for row, files in files_by_row().items():
        if row not in rows:
            forgotten.append(f"{files} are marked with {row}, which is no row")
            continue
        forgotten += [f"{row} does not name {file}" for file in files if file not in rows[row][1]]
    assert not forgotten, "\n".join(["", *forgotten, "python -m tests.support.feature_marks writes their names."])
