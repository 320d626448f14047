"""The project's pages as data: code blocks, tables and links. Used by the tests of README.md and docs/."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.source_tree import ROOT


def pages() -> list[Path]:
    """Every page that a reader may open."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def shell_commands(text: str) -> list[str]:
    """The commands of all `bash` blocks, one each; lines that end in a backslash are joined."""
    commands = []
    for block in code_blocks(text, "bash"):
        joined = block.replace("\\\n", " ")
        commands.extend(line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#"))
    return commands


def without_code(text: str) -> str:
    """The prose: fenced blocks and inline code taken out."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def link_targets(text: str) -> list[str]:
    """Where the links of a page lead, as written."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def heading_anchors(text: str) -> set[str]:
    """The anchors that a page's headings make."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_rows(text: str, num_columns: int) -> list[list[str]]:
    """The cells of every table row with this many columns, header and separator lines left out."""
    rows = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        is_header = number + 1 < len(lines) and re.fullmatch(r"\|[-:|]+\|", lines[number + 1])
        if not line.startswith("|") or is_header or re.fullmatch(r"\|[-:|]+\|", line):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == num_columns:
            rows.append(cells)
    return rows
