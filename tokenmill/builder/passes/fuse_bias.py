"""Biases become part of the product before them."""

from __future__ import annotations

from dataclasses import replace

from tokenmill.builder.graph import Graph
from tokenmill.builder.passes.rewriting import Rewriter, Target


def fuse_bias(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """`add_bias(linear(x))` becomes `linear(x, bias)`."""
    rewriter = Rewriter(graph)
    for node in graph.nodes_of_kind("add_bias"):
        linear = rewriter.producer(node.inputs["x"], "linear")
        if linear is None or "bias" in linear.weights or rewriter.only_user(linear.y.name) is not node:
            continue
        weights = {**linear.weights, "bias": node.weights["bias"]}
        rewriter.replace(linear, replace(linear, outputs={"y": node.y}, weights=weights))
        rewriter.remove(node)
        rewriter.report(f"{linear.name} adds its bias")
    return rewriter.result(), rewriter.changes
