"""Of the last layer only the rows whose logits are wanted are computed, once their attention is there."""

from __future__ import annotations

from dataclasses import replace

from tokenmill.builder.graph import Graph, Node
from tokenmill.builder.passes.rewriting import Rewriter, Target

ROW_WISE = (
    "activation",
    "add",
    "add_bias",
    "add_rms_norm",
    "concat",
    "experts",
    "gated_activation",
    "linear",
    "multiply",
    "quantize",
    "rms_norm",
    "scale",
    "slice",
    "soft_cap",
)
"""Kinds whose results for a row depend on no other row."""


def select_rows_early(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """Move `select_rows` up through everything that serves nothing else."""
    rewriter = Rewriter(graph)
    for selection in graph.nodes_of_kind("select_rows"):
        moved = _nodes_above(rewriter, selection)
        if not moved:
            continue
        selected: dict[str, str] = {}  # value -> its selected rows
        rows = selection.y.rows
        for node in graph.nodes:
            if node.name not in moved:
                continue
            new_nodes = []
            for name in node.inputs.values():
                producer = rewriter.producers.get(name)
                if name not in selected and (producer is None or producer.name not in moved):
                    selected[name] = f"{name}.selected"
                    value = replace(rewriter.values[name], name=selected[name], rows=rows)
                    inputs = {"x": name, "row_index": selection.inputs["row_index"]}
                    new_nodes.append(Node("select_rows", value.name, inputs, {"y": value}))
            inputs = {role: selected.get(name, name) for role, name in node.inputs.items()}
            outputs = {role: replace(value, rows=rows) for role, value in node.outputs.items()}
            rewriter.replace(node, *new_nodes, replace(node, inputs=inputs, outputs=outputs))
        rewriter.rename(selection.y.name, selection.inputs["x"])
        rewriter.remove(selection)
        rewriter.report(f"{selection.name} moved up through {len(moved)} nodes to {', '.join(selected)}")
    return rewriter.result(), rewriter.changes


def _nodes_above(rewriter: Rewriter, selection: Node) -> set[str]:
    """Names of the row-wise nodes that only `selection` needs."""
    moved: set[str] = set()
    found = {selection.name}
    position = rewriter.graph.nodes.index(selection)
    for node in reversed(rewriter.graph.nodes[:position]):
        users = [user for value in node.outputs.values() for user in rewriter.users[value.name]]
        is_output = any(value.name == rewriter.graph.output for value in node.outputs.values())
        if node.kind in ROW_WISE and users and not is_output and all(user.name in found for user in users):
            moved.add(node.name)
            found.add(node.name)
    return moved
