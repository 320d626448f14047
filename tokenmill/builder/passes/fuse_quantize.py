"""Quantization in the pass that computes the values: what `fuse_norm_quantize` and `fuse_activation_quantize` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tokenmill.builder.graph import Graph
from tokenmill.builder.passes.rewriting import Rewriter, Target


def fuse_norm_quantize(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """Norms of rows write int8 where only `quantize` reads them."""
    return _fuse(graph, ("rms_norm", "add_rms_norm"))


def fuse_activation_quantize(graph: Graph, target: Target) -> tuple[Graph, list[str]]:
    """Gated activations, alone or in a product's epilogue, write int8 where only `quantize` reads them."""
    return _fuse(graph, ("gated_activation", "linear"))


def _fuse(graph: Graph, kinds: Sequence[str]) -> tuple[Graph, list[str]]:
    rewriter = Rewriter(graph)
    for node in graph.nodes_of_kind("quantize"):
        source = rewriter.producers.get(node.inputs["x"])
        if source is None or source.kind not in kinds or source.y.name != node.inputs["x"]:
            continue
        has_epilogue = source.kind != "linear" or "activation" in source.attributes
        if not has_epilogue or "head_dim" in source.attributes or rewriter.only_user(source.y.name) is not node:
            continue
        rewriter.replace(source, replace(source, outputs={**source.outputs, "y": node.y}))
        rewriter.remove(node)
        rewriter.report(f"{source.name} writes int8")
    return rewriter.result(), rewriter.changes
