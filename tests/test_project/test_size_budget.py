"""Nothing grows without end: files, functions and classes keep to a budget, or stand in a dated list with a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.source_tree import ROOT

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_CLASS_METHODS = 20
MAX_CLASS_ATTRIBUTES = 25

FOLDERS = ("tokenmill", "tests", "scripts", "benchmarks", "examples")


class Exemption(NamedTuple):
    """Why something may be larger, and since when."""

    since: date
    reason: str


# Key: "<path>" for a file, "<path>::<qualified name>" for a function or class.
EXEMPTIONS: dict[str, Exemption] = {
    "tokenmill/config.py::LlmArgs": Exemption(
        date(2026, 11, 22), "one field for each argument of LLM; what belongs together is nested already"
    ),
    "tokenmill/executor/executor.py::GenerationExecutor": Exemption(
        date(2026, 11, 22),
        "the seam between callers and engines: submit, abort, health, statistics, shutdown and `with`",
    ),
    "tokenmill/sampling_params.py::SamplingParams": Exemption(
        date(2026, 11, 22), "one field for each parameter of TensorRT-LLM's SamplingParams, whose names scripts use"
    ),
}


class Excess(NamedTuple):
    """Something over its budget."""

    key: str
    what: str
    size: int
    budget: int


def excesses(path: str, text: str) -> Iterator[Excess]:
    """Everything in one file that is over budget."""
    num_lines = len(text.splitlines())
    if num_lines > MAX_FILE_LINES:
        yield Excess(path, "lines", num_lines, MAX_FILE_LINES)
    yield from _excesses_below(path, "", ast.parse(text))


def _excesses_below(path: str, prefix: str, node: ast.AST) -> Iterator[Excess]:
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{child.name}" if prefix else child.name
            sizes = _class_sizes(child) if isinstance(child, ast.ClassDef) else _function_sizes(child)
            for what, size, budget in sizes:
                if size > budget:
                    yield Excess(f"{path}::{name}", what, size, budget)
        yield from _excesses_below(path, name, child)


def _function_sizes(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[tuple[str, int, int]]:
    assert node.end_lineno is not None
    return [("lines", node.end_lineno - node.lineno + 1, MAX_FUNCTION_LINES)]


def _class_sizes(node: ast.ClassDef) -> list[tuple[str, int, int]]:
    methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)}
    assigned: list[ast.expr] = []
    for part in node.body:
        if isinstance(part, ast.Assign):
            assigned.extend(part.targets)
        elif isinstance(part, ast.AnnAssign):
            assigned.append(part.target)
    attributes = {target.id for target in assigned if isinstance(target, ast.Name)}
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and ast.unparse(part.value) == "self":
            attributes.add(part.attr)
    return [("methods", len(methods), MAX_CLASS_METHODS), ("attributes", len(attributes), MAX_CLASS_ATTRIBUTES)]


def python_files() -> list[Path]:
    """Every Python file of the project."""
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def all_excesses() -> list[Excess]:
    """Everything in the project that is over budget, exemptions included."""
    return [
        excess
        for path in python_files()
        for excess in excesses(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]


def test_everything_is_within_its_budget() -> None:
    assert len(python_files()) > 20
    found = [excess for excess in all_excesses() if excess.key not in EXEMPTIONS]
    assert not found, "\n".join(["", *(f"{key}: {size} {what}, budget {budget}" for key, what, size, budget in found)])


def test_every_exemption_is_still_needed() -> None:
    assert set(EXEMPTIONS) - {excess.key for excess in all_excesses()} == set()


@pytest.mark.parametrize(
    ("text", "key", "what"),
    [
        ("x = 1\n" * 501, "f.py", "lines"),
        ("def f():\n" + "    x = 1\n" * 60, "f.py::f", "lines"),
        ("class A:\n  class B:\n    async def g(self):\n" + "      x = 1\n" * 60, "f.py::A.B.g", "lines"),
        ("class A:\n" + "".join(f"  def m{i}(self): ...\n" for i in range(21)), "f.py::A", "methods"),
        ("class A:\n" + "".join(f"  a{i}: int\n" for i in range(26)), "f.py::A", "attributes"),
        ("class A:\n  def m(self):\n" + "".join(f"    self.a{i} = 1\n" for i in range(26)), "f.py::A", "attributes"),
    ],
)
def test_an_excess_is_found(text: str, key: str, what: str) -> None:
    assert [(excess.key, excess.what) for excess in excesses("f.py", text)] == [(key, what)]


def test_the_limits_themselves_are_allowed() -> None:
    text = "class A:\n" + "".join(f"  a{i}: int\n" for i in range(25)) + "def f():\n" + "    x = 1\n" * 59
    assert list(excesses("f.py", text)) == []
