"""Inputs of products with quantized weights become int8 where the executor multiplies integers."""

from __future__ import annotations

from dataclasses import replace

from tokenmill.builder.graph import Graph, Node
from tokenmill.builder.passes.rewriting import Rewriter, Target


def quantize_activations(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """One `quantize` node for each value that such products read."""
    rewriter = Rewriter(graph)
    quantized: dict[str, str] = {}
    for node in graph.nodes_of_kind("linear"):
        if graph.weights[node.weights["weight"]].format not in target.int8_activation_formats:
            continue
        x = rewriter.values[node.inputs["x"]]
        if x.dtype == "int8_group32":
            continue
        new_nodes = []
        if x.name not in quantized:
            quantized[x.name] = f"{x.name}.int8"
            value = replace(x, name=quantized[x.name], dtype="int8_group32")
            new_nodes.append(Node("quantize", value.name, {"x": x.name}, {"y": value}))
            rewriter.report(f"{x.name} is quantized")
        rewriter.replace(node, *new_nodes, replace(node, inputs={**node.inputs, "x": quantized[x.name]}))
    return rewriter.result(), rewriter.changes
