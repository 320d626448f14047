"""Slices and concatenations of columns that lead to nothing but another view."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokenmill.builder.graph import Graph, Node, Value
from tokenmill.builder.passes.rewriting import Rewriter, Target


@dataclass(frozen=True, slots=True)
class _Columns:
    """Columns `first` to `first + count - 1` of a value."""

    value: str
    first: int
    count: int


def simplify_views(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """Whoever reads a view that is a whole other value, or columns of one, reads that value or a slice of it."""
    rewriter = Rewriter(graph)
    pieces: dict[str, list[_Columns]] = {}  # of each view: columns of values that are no views
    for node in graph.nodes:
        if node.kind not in ("slice", "concat"):
            continue
        found = _pieces_of(node, pieces, rewriter.values)
        pieces[node.y.name] = found
        columns = rewriter.values[found[0].value].columns
        if len(found) == 1 and found[0].count == columns and rewriter.values[found[0].value].rows == node.y.rows:
            rewriter.rename(node.y.name, found[0].value)
            rewriter.remove(node)
            rewriter.report(f"{node.name} is {found[0].value}")
        else:
            _simplify(rewriter, node, found)
    return rewriter.result(), rewriter.changes


def _pieces_of(node: Node, pieces: dict[str, list[_Columns]], values: dict[str, Value]) -> list[_Columns]:
    """What a view consists of."""
    parts: list[_Columns] = []
    for name in node.inputs.values():
        parts.extend(pieces.get(name, [_Columns(name, 0, values[name].columns)]))
    if node.kind == "slice":
        first, count = node.attributes["first_column"], node.attributes["num_columns"]
        assert isinstance(first, int) and isinstance(count, int)
        parts = _cut(parts, first, count)
    return _joined(parts)


def _cut(parts: list[_Columns], first: int, count: int) -> list[_Columns]:
    found, start = [], 0
    for part in parts:
        low, high = max(first, start), min(first + count, start + part.count)
        if low < high:
            found.append(_Columns(part.value, part.first + low - start, high - low))
        start += part.count
    return found


def _joined(parts: list[_Columns]) -> list[_Columns]:
    """Neighbours in the same value as one."""
    found = [parts[0]]
    for part in parts[1:]:
        last = found[-1]
        if part.value == last.value and part.first == last.first + last.count:
            found[-1] = _Columns(last.value, last.first, last.count + part.count)
        else:
            found.append(part)
    return found


def _simplify(rewriter: Rewriter, node: Node, found: list[_Columns]) -> None:
    """Read the values below the views directly, where whole values or one slice suffice."""
    if len(found) == 1:
        inputs = {"x": found[0].value}
        attributes = {"first_column": found[0].first, "num_columns": found[0].count}
        new = replace(node, kind="slice", inputs=inputs, attributes=attributes)
    elif all(part.first == 0 and part.count == rewriter.values[part.value].columns for part in found):
        inputs = {f"x{index}": part.value for index, part in enumerate(found)}
        new = replace(node, kind="concat", inputs=inputs, attributes={})
    else:
        return
    if new != node:
        rewriter.replace(node, new)
        rewriter.report(f"{node.name} reads {', '.join(inputs.values())}")
