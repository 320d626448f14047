"""Query, key and value projections as one product."""

from __future__ import annotations

from tokenmill.builder.graph import Graph, Node
from tokenmill.builder.passes.merging import merge
from tokenmill.builder.passes.rewriting import Rewriter, Target

BETWEEN = ("add_bias", "rms_norm", "rope")
"""Kinds that may lie between a projection and attention or the cache."""


def merge_qkv(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """Merge the linear nodes behind the query, key and value of each layer, if they have the same input."""
    rewriter = Rewriter(graph)
    writes = {node.attributes["layer"]: node for node in graph.nodes_of_kind("write_cache")}
    for attention in graph.nodes_of_kind("attention"):
        write = writes.get(attention.attributes["layer"])
        if write is None:
            continue
        values = (attention.inputs["query"], write.inputs["key"], write.inputs["value"])
        nodes = [_projection(rewriter, value) for value in values]
        if all(node is not None for node in nodes):
            merge(rewriter, [node for node in nodes if node is not None])
    return rewriter.result(), rewriter.changes


def _projection(rewriter: Rewriter, value: str) -> Node | None:
    node = rewriter.producers.get(value)
    while node is not None and node.kind in BETWEEN:
        node = rewriter.producers.get(node.inputs["x"])
    return node if node is not None and node.kind == "linear" and not rewriter.is_taken(node) else None
