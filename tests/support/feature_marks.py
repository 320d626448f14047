"""Which test files prove which rows of docs/features.md, by their marks. Fills the table's column of tests:

python -m tests.support.feature_marks
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from tests.support.source_tree import ROOT

TABLE = ROOT / "docs" / "features.md"
TESTS_COLUMN = 4


def marked_rows(path: Path) -> set[str]:
    """The rows that the tests of one file are marked with."""
    rows: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.spec":
            rows.update(argument.value for argument in node.args if isinstance(argument, ast.Constant))
    return rows


def files_by_row() -> dict[str, list[str]]:
    """Test files of every row that a test is marked with, in order of name."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for row in marked_rows(path):
            found[row].append(path.relative_to(ROOT).as_posix())
    return found


def fill_table(text: str, files: dict[str, list[str]]) -> str:
    """The table with its column of tests as the marks say; the other columns are written by people."""
    lines = []
    for line in text.split("\n"):
        row = re.match(r"\| ([A-H]\d) \|", line)
        if row:
            cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
            cells[TESTS_COLUMN] = ", ".join(f"`{file}`" for file in files.get(row[1], ()))
            line = "|".join(["", *(f" {cell} " if cell else " " for cell in cells), ""])
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    TABLE.write_text(fill_table(TABLE.read_text(encoding="utf-8"), files_by_row()), encoding="utf-8")
