"""Norms and rotations of query and key heads and the write to the cache in one pass over the projections."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.builder.graph import Graph, Node
from tokenmill.builder.passes.rewriting import Rewriter, Target
from tokenmill.program.program import AttributeValue


@dataclass(frozen=True, slots=True)
class _Heads:
    """What happens to the heads of a query or key: a rotation, and maybe a norm before it."""

    rope: Node
    norm: Node | None

    @property
    def source(self) -> str:
        return (self.norm or self.rope).inputs["x"]

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (self.rope,) if self.norm is None else (self.rope, self.norm)


def fuse_rope_cache_write(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """The rotations of a layer's query and key, the norms before them and `write_cache` become `rope_write_cache`."""
    rewriter = Rewriter(graph)
    writes = {node.attributes["layer"]: node for node in graph.nodes_of_kind("write_cache")}
    for attention in graph.nodes_of_kind("attention"):
        write = writes.get(attention.attributes["layer"])
        if write is None:
            continue
        query = _heads(rewriter, attention.inputs["query"], attention)
        key = _heads(rewriter, write.inputs["key"], write)
        if query is None or key is None or not _fit(query, key):
            continue
        if rewriter.positions[query.rope.name] > rewriter.positions[write.name]:
            continue
        rewriter.replace(write, _fused(query, key, write))
        rewriter.remove(*query.nodes, *key.nodes)
        norms = "norms, rotations" if query.norm or key.norm else "rotations"
        rewriter.report(f"layer {write.attributes['layer']}: {norms} and write to the cache")
    return rewriter.result(), rewriter.changes


def _heads(rewriter: Rewriter, value: str, user: Node) -> _Heads | None:
    rope = rewriter.producer(value, "rope")
    if rope is None or rewriter.only_user(value) is not user:
        return None
    norm = rewriter.producer(rope.inputs["x"], "rms_norm")
    if norm is not None and (
        norm.attributes.get("head_dim") != rope.attributes["head_dim"] or rewriter.only_user(norm.y.name) is not rope
    ):
        norm = None
    return _Heads(rope, norm)


def _fit(query: _Heads, key: _Heads) -> bool:
    norms = [heads.norm for heads in (query, key) if heads.norm is not None]
    return (
        query.rope.inputs["rotation"] == key.rope.inputs["rotation"]
        and query.rope.attributes["head_dim"] == key.rope.attributes["head_dim"]
        and len({norm.attributes["eps"] for norm in norms}) <= 1
    )


def _fused(query: _Heads, key: _Heads, write: Node) -> Node:
    inputs = {
        "query": query.source,
        "key": key.source,
        "value": write.inputs["value"],
        "rotation": query.rope.inputs["rotation"],
    }
    weights = {
        role: heads.norm.weights["weight"]
        for role, heads in (("query_norm", query), ("key_norm", key))
        if heads.norm is not None
    }
    attributes: dict[str, AttributeValue] = {
        "layer": write.attributes["layer"],
        "head_dim": query.rope.attributes["head_dim"],
    }
    norm = query.norm or key.norm
    if norm is not None:
        attributes["eps"] = norm.attributes["eps"]
    name = write.name.removesuffix("write_cache") + "rope_write_cache"
    return Node("rope_write_cache", name, inputs, {"y": query.rope.y}, weights, attributes)
