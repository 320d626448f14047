"""The residual stream is added in the epilogue of the product before it.

Counted in passes over [T, hidden_size]: product, then `add_rms_norm` writes the product, reads it and the stream,
writes the sum and the norm: five. The product with the stream as its residual, then `rms_norm` reads the stream, writes
the sum in its place, reads it, writes the norm: four. So this comes first, and `fuse_add_norm` takes what is left, such
as Gemma's streams with a norm between product and sum.
"""

from __future__ import annotations

from dataclasses import replace

from tokenmill.builder.graph import Graph, Node
from tokenmill.builder.passes.rewriting import Rewriter, Target


def fuse_residual(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """`add(stream, linear(x))` becomes `linear(x, residual=stream)`."""
    rewriter = Rewriter(graph)
    for node in graph.nodes_of_kind("add"):
        for role, other in (("b", "a"), ("a", "b")):
            linear = rewriter.producer(node.inputs[role], "linear")
            if linear is None or not _can_add(rewriter, linear, node):
                continue
            inputs = {**linear.inputs, "residual": node.inputs[other]}
            rewriter.replace(node, replace(linear, inputs=inputs, outputs={"y": node.y}))
            rewriter.remove(linear)
            rewriter.report(f"{linear.name} adds the residual stream")
            break
    return rewriter.result(), rewriter.changes


def _can_add(rewriter: Rewriter, linear: Node, node: Node) -> bool:
    return (
        rewriter.only_user(linear.y.name) is node
        and "residual" not in linear.inputs
        and "activation" not in linear.attributes
    )
