"""docs/errors.md shows the error tree as it is: every class in its place, with its code and HTTP status."""

from __future__ import annotations

import re

import pytest

from tests.support.documents import table_rows
from tests.support.source_tree import ROOT
from tokenmill.errors import TokenmillError

Row = tuple[str, str, str, str]


def subtree(error_class: type[TokenmillError], depth: int = 0) -> list[Row]:
    """(place, class, code, HTTP status) of a class and all below it, in the order of their definition."""
    rows = [("- " * depth, error_class.__name__, error_class.code, str(error_class.http_status))]
    children = [child for child in error_class.__subclasses__() if child.__module__ == "tokenmill.errors"]
    return rows + [row for child in children for row in subtree(child, depth + 1)]


def page_rows(text: str) -> list[tuple[Row, str, str]]:
    """The rows of the page's table, and what they say of when an error is raised and what to do."""
    rows = []
    for name, code, status, when, remedy in table_rows(text, 5):
        match = re.fullmatch(r"((?:- )*)`(\w+)`", name)
        assert match is not None, f"the first cell of a row is '{name}'"
        rows.append(((match[1], match[2], code.strip("`"), status), when, remedy))
    return rows


@pytest.mark.spec("F1")
def test_the_page_shows_every_error_in_its_place() -> None:
    rows = page_rows((ROOT / "docs/errors.md").read_text(encoding="utf-8"))
    assert [row for row, _, _ in rows] == subtree(TokenmillError)


@pytest.mark.spec("F1")
def test_every_row_says_when_and_what_to_do() -> None:
    for (_, name, _, _), when, remedy in page_rows((ROOT / "docs/errors.md").read_text(encoding="utf-8")):
        assert when, f"{name}: when is it raised?"
        assert remedy or when.startswith("base"), f"{name}: what is to be done?"


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("| - - `QueueFullError` | `queue_full` | 429 |", "| - - `QueueFullError` | `queue_full` | 503 |"),
        ("| - - `QueueFullError` | `queue_full` | 429 |", "| - - `QueueFullError` | `queue_is_full` | 429 |"),
        ("| - - `QueueFullError` |", "| - `QueueFullError` |"),
        ("| - - `QueueFullError` |", "| - - `QueueEmptyError` |"),
    ],
)
def test_a_wrong_row_is_found(line: str, other: str) -> None:
    text = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    assert text.count(line) == 1
    assert [row for row, _, _ in page_rows(text.replace(line, other))] != subtree(TokenmillError)
