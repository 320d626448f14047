"""SwiGLU and GeGLU in the epilogue of the merged gate and up projection: [T, 2 I] never reaches memory."""

from __future__ import annotations

from dataclasses import replace

from tokenmill.builder.graph import Graph, Node
from tokenmill.builder.passes.rewriting import Rewriter, Target


def fuse_gated_activation(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """`gated_activation` of the halves of a linear node's output becomes its `activation`."""
    rewriter = Rewriter(graph)
    for node in graph.nodes_of_kind("gated_activation"):
        halves = [rewriter.producer(node.inputs[role], "slice") for role in ("gate", "up")]
        gate, up = halves
        if gate is None or up is None or gate.inputs != up.inputs:
            continue
        linear = rewriter.producer(gate.inputs["x"], "linear")
        if linear is None or not _are_halves(rewriter, linear, gate, up, node):
            continue
        attributes = {**linear.attributes, "activation": node.attributes["activation"]}
        rewriter.replace(linear, replace(linear, outputs={"y": node.y}, attributes=attributes))
        rewriter.remove(gate, up, node)
        rewriter.report(f"{linear.name} computes {node.attributes['activation']}(gate) * up")
    return rewriter.result(), rewriter.changes


def _are_halves(rewriter: Rewriter, linear: Node, gate: Node, up: Node, node: Node) -> bool:
    half = linear.y.columns // 2
    return (
        (gate.attributes["first_column"], up.attributes["first_column"]) == (0, half)
        and gate.y.columns == up.y.columns == half
        and len(rewriter.users[linear.y.name]) == 2
        and rewriter.only_user(gate.y.name) is node
        and rewriter.only_user(up.y.name) is node
        and "residual" not in linear.inputs
        and "activation" not in linear.attributes
    )
