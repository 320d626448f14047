"""The rotation of projections side by side becomes one rotation for each: what other passes look for."""

from __future__ import annotations

from dataclasses import replace

from tokenmill.builder.graph import Graph, Node
from tokenmill.builder.passes.rewriting import Rewriter, Target
from tokenmill.builder.passes.simplify_views import simplify_views


def split_rope(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """`rope(concat(a, b))` becomes `concat(rope(a), rope(b))`; views of the result are simplified."""
    rewriter = Rewriter(graph)
    for node in graph.nodes_of_kind("rope"):
        concat = rewriter.producers.get(node.inputs["x"])
        head_dim = node.attributes["head_dim"]
        assert isinstance(head_dim, int)
        if concat is None or concat.kind != "concat":
            continue
        parts = [rewriter.values[name] for name in concat.inputs.values()]
        if any(part.columns % head_dim for part in parts):
            continue
        new = []
        for index, part in enumerate(parts):
            name = f"{node.name}.{index}"
            inputs = {**node.inputs, "x": part.name}
            new.append(replace(node, name=name, inputs=inputs, outputs={"y": replace(part, name=name)}))
        inputs = {f"x{index}": one.y.name for index, one in enumerate(new)}
        rewriter.replace(node, *new, Node("concat", node.name, inputs, {"y": node.y}))
        rewriter.report(f"{node.name} became {len(new)} nodes")
    if not rewriter.changes:
        return graph, []
    return simplify_views(rewriter.result(), target)[0], rewriter.changes
