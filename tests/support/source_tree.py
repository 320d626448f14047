"""The project's own source as data: modules, their parsed text, what each imports. Used by the project-rule tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "tokenmill"


@dataclass(frozen=True)
class Import:
    """One imported module.

    Args:
        target: dotted name of the module; for `from a import b` it is `a.b` when that is a module of ours, else `a`.
        line: where it stands.
        late: inside a function, so it runs on a call and not on import.
        typing_only: under `if TYPE_CHECKING`, so it never runs.
    """

    target: str
    line: int
    late: bool
    typing_only: bool


@dataclass(frozen=True)
class Module:
    """A module of the package, found by its file."""

    name: str
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        """Its parsed text."""
        return ast.parse(self.path.read_text(encoding="utf-8"), filename=str(self.path))

    @property
    def is_package(self) -> bool:
        """Whether it is a folder's `__init__`."""
        return self.path.name == "__init__.py"


def package_modules(root: Path = ROOT) -> dict[str, Module]:
    """Every module of `root`/tokenmill by dotted name, in order of name."""
    modules = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(name, path)
    return modules


def imports_of(module: Module, known: dict[str, Module]) -> Iterator[Import]:
    """Everything that `module` imports, wherever the statement stands."""
    yield from _walk(module, module.tree, known, late=False, typing_only=False)


def _walk(
    module: Module, node: ast.AST, known: dict[str, Module], *, late: bool, typing_only: bool
) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, late, typing_only)
        elif isinstance(child, ast.ImportFrom):
            base = _absolute(module, child)
            for alias in child.names:
                full = f"{base}.{alias.name}"
                yield Import(full if full in known else base, child.lineno, late, typing_only)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from _walk(module, _wrapped(statement), known, late=late, typing_only=True)
            for statement in child.orelse:
                yield from _walk(module, _wrapped(statement), known, late=late, typing_only=typing_only)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(module, child, known, late=late or inside, typing_only=typing_only)


def _wrapped(statement: ast.stmt) -> ast.Module:
    return ast.Module(body=[statement], type_ignores=[])


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + (1 if module.is_package else 0)]
    return ".".join([*parts, node.module] if node.module else parts)


def loaded_by(name: str, known: dict[str, Module]) -> dict[str, tuple[str, ...]]:
    """Every module that importing `name` runs or asks for, ours and others', with the chain that leads to it.

    Packages run their `__init__` first, so `a.b.c` stands for `a`, `a.b` and `a.b.c`. Late imports do not count.
    """
    chains: dict[str, tuple[str, ...]] = {}
    pending = [(parent, (parent,)) for parent in _with_parents(name)]
    while pending:
        current, chain = pending.pop()
        if current in chains:
            continue
        chains[current] = chain
        if current not in known:
            continue
        for found in imports_of(known[current], known):
            if not found.late and not found.typing_only:
                pending.extend((target, (*chain, target)) for target in _with_parents(found.target))
    return chains


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]
