"""Nodes and weights that nothing needs."""

from __future__ import annotations

from dataclasses import replace

from tokenmill.builder.graph import Graph
from tokenmill.builder.passes.rewriting import Target

EFFECTS = ("write_cache", "rope_write_cache")
"""Kinds of nodes that do more than compute their outputs."""


def eliminate_dead_code(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """Drop nodes whose outputs nobody reads, unless they write to the cache, and unused weights."""
    needed, kept, dropped = {graph.output}, [], []
    for node in reversed(graph.nodes):
        if node.kind in EFFECTS or any(value.name in needed for value in node.outputs.values()):
            kept.append(node)
            needed.update(node.inputs.values())
            needed.update(node.weights.values())
        else:
            dropped.append(f"{node.name} is not needed")
    dropped.reverse()
    weights = {name: weight for name, weight in graph.weights.items() if name in needed}
    dropped.extend(f"the weight {name} is not needed" for name in graph.weights if name not in weights)
    if not dropped:
        return graph, []
    constants = {name: numbers for name, numbers in graph.constants.items() if name in weights}
    return replace(graph, nodes=tuple(reversed(kept)), weights=weights, constants=constants), dropped
