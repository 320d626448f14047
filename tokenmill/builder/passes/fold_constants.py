"""Arithmetic on constants alone, and factors that another node takes in: Gemma's `1 + weight`, scaled embeddings."""

from __future__ import annotations

from dataclasses import replace

from tokenmill.builder.graph import Graph
from tokenmill.builder.passes.rewriting import Rewriter, Target


def fold_constants(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """`offset_weight` becomes a weight, `scale` of an embedding its factor."""
    graph, changes = fold_weights(graph)
    rewriter = Rewriter(graph)
    for node in graph.nodes_of_kind("scale"):
        embedding = rewriter.producer(node.inputs["x"], "embedding")
        if embedding is None or rewriter.only_user(embedding.y.name) is not node:
            continue
        scale, factor = embedding.attributes["scale"], node.attributes["factor"]
        assert isinstance(scale, float) and isinstance(factor, float)
        rewriter.replace(
            embedding,
            replace(embedding, outputs={"y": node.y}, attributes={**embedding.attributes, "scale": scale * factor}),
        )
        rewriter.remove(node)
        rewriter.report(f"{node.name} became the factor of {embedding.name}")
    return rewriter.result(), changes + rewriter.changes


def fold_weights(graph: Graph) -> tuple[Graph, list[str]]:
    """Arithmetic on weights becomes `Weight.transform`; lowering needs it, so it does it if the pass did not."""
    rewriter = Rewriter(graph)
    for node in graph.nodes_of_kind("offset_weight"):
        weight = graph.weights[node.weights["weight"]]
        if node.attributes["offset"] != 1.0 or weight.transform != "none":
            continue
        folded = replace(weight, name=f"{weight.name}_plus_one", transform="add_one")
        rewriter.rename(node.y.name, rewriter.add_weight(folded))
        rewriter.remove(node)
        rewriter.report(f"{node.name} became the weight {folded.name}")
    return rewriter.result(), rewriter.changes
