"""Gate and up projections as one product."""

from __future__ import annotations

from tokenmill.builder.graph import Graph, Node
from tokenmill.builder.passes.merging import merge
from tokenmill.builder.passes.rewriting import Rewriter, Target


def merge_gate_up(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """Merge the linear nodes behind the two inputs of each gated activation, if they have the same input."""
    rewriter = Rewriter(graph)
    for node in graph.nodes_of_kind("gated_activation"):
        gate, up = (_projection(rewriter, node.inputs[role]) for role in ("gate", "up"))
        if gate is not None and up is not None:
            merge(rewriter, [gate, up])
    return rewriter.result(), rewriter.changes


def _projection(rewriter: Rewriter, value: str) -> Node | None:
    bias = rewriter.producer(value, "add_bias")
    return rewriter.producer(value if bias is None else bias.inputs["x"], "linear")
