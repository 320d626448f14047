"""A sum and the norm of it in one pass over both."""

from __future__ import annotations

from dataclasses import replace

from tokenmill.builder.graph import Graph
from tokenmill.builder.passes.rewriting import Rewriter, Target


def fuse_add_norm(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """`rms_norm(add(a, b))` becomes `add_rms_norm`, whose sum others may still read."""
    rewriter = Rewriter(graph)
    for node in graph.nodes_of_kind("rms_norm"):
        add = rewriter.producer(node.inputs["x"], "add")
        if add is None or "head_dim" in node.attributes:
            continue
        inputs = {"x": add.inputs["b"], "residual": add.inputs["a"]}
        outputs = {"y": node.y, "sum": add.y}
        rewriter.replace(add, replace(node, kind="add_rms_norm", inputs=inputs, outputs=outputs))
        rewriter.remove(node)
        rewriter.report(f"{node.name} adds, too")
    return rewriter.result(), rewriter.changes
