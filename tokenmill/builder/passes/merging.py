"""Several projections of one input as one product: what `merge_qkv` and `merge_gate_up` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tokenmill.builder.graph import Node, Value
from tokenmill.builder.passes.rewriting import Rewriter
from tokenmill.program.program import AttributeValue, Weight


def merge(rewriter: Rewriter, nodes: Sequence[Node]) -> None:
    """Replace linear nodes, in the order of their outputs, by merged ones and slices.

    Only weights of one format can lie in one matrix: of a query, key and value in two formats the equal neighbours are
    merged.
    """
    groups: list[list[Node]] = []
    for node in nodes:
        if groups and _belong_together(rewriter, groups[-1][0], node):
            groups[-1].append(node)
        else:
            groups.append([node])
    for group in groups:
        if len(group) > 1:
            _merge_group(rewriter, group)


def _belong_together(rewriter: Rewriter, first: Node, second: Node) -> bool:
    weights = rewriter.graph.weights
    one, other = weights[first.weights["weight"]], weights[second.weights["weight"]]
    return (
        first.inputs == second.inputs
        and first.attributes == second.attributes
        and first.weights.keys() == second.weights.keys()
        and (one.format, one.layout, one.transform) == (other.format, other.layout, other.transform)
        and one.name != other.name
    )


def _merge_group(rewriter: Rewriter, group: Sequence[Node]) -> None:
    parents, names = zip(*(node.name.rpartition(".")[::2] for node in group), strict=True)
    name = rewriter.new_name(_merged_name(parents[0], names))
    weights = {
        role: rewriter.add_weight(_concatenated(f"{name}.{role}", [_weight(rewriter, node, role) for node in group]))
        for role in group[0].weights
    }
    total = sum(node.y.columns for node in group)
    merged = replace(group[0], name=name, outputs={"y": replace(group[0].y, name=name, columns=total)}, weights=weights)
    slices, first = [], 0
    for node in group:
        slices.append(_slice(merged.y, first, node.y))
        first += node.y.columns
    earliest = min(group, key=lambda node: rewriter.positions[node.name])  # whoever reads a part comes after it
    rewriter.replace(earliest, merged, *slices)
    rewriter.remove(*(node for node in group if node is not earliest))
    rewriter.report(f"{', '.join(node.name for node in group)} became {name}")


def _merged_name(parent: str, names: Sequence[str]) -> str:
    """`q_proj`, `k_proj` and `v_proj` are `qkv_proj`; `gate_proj` and `up_proj` are `gate_up_proj`."""
    stems = [name.removesuffix("_proj") for name in names]
    joined = ("" if all(len(stem) == 1 for stem in stems) else "_").join(stems)
    return f"{parent}.{joined}_proj" if parent else f"{joined}_proj"


def _weight(rewriter: Rewriter, node: Node, role: str) -> Weight:
    return rewriter.graph.weights[node.weights[role]]


def _concatenated(name: str, weights: Sequence[Weight]) -> Weight:
    first = weights[0]
    num_rows = sum(weight.shape[0] for weight in weights)
    parts = tuple(part for weight in weights for part in weight.parts)
    return replace(first, name=name, shape=(num_rows, *first.shape[1:]), parts=parts)


def _slice(source: Value, first_column: int, y: Value) -> Node:
    attributes: dict[str, AttributeValue] = {"first_column": first_column, "num_columns": y.columns}
    return Node("slice", y.name, {"x": source.name}, {"y": y}, {}, attributes)
