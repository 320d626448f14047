"""Graph passes: named, in order, each one function from a graph to a graph and a list of what it changed.

`run_passes` applies them; any of them can be left out, in any combination, and the program computes the same. A new
pass is a function in a file of its own and a line in `PASSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, TypeAlias

from tokenmill.builder.graph import Graph, diff
from tokenmill.builder.passes.eliminate_dead_code import eliminate_dead_code
from tokenmill.builder.passes.fold_constants import fold_constants
from tokenmill.builder.passes.fuse_add_norm import fuse_add_norm
from tokenmill.builder.passes.fuse_bias import fuse_bias
from tokenmill.builder.passes.fuse_gated_activation import fuse_gated_activation
from tokenmill.builder.passes.fuse_quantize import fuse_activation_quantize, fuse_norm_quantize
from tokenmill.builder.passes.fuse_residual import fuse_residual
from tokenmill.builder.passes.fuse_rope_cache_write import fuse_rope_cache_write
from tokenmill.builder.passes.merge_gate_up import merge_gate_up
from tokenmill.builder.passes.merge_qkv import merge_qkv
from tokenmill.builder.passes.quantize_activations import quantize_activations
from tokenmill.builder.passes.rewriting import Target
from tokenmill.builder.passes.select_rows_early import select_rows_early
from tokenmill.builder.passes.simplify_views import simplify_views
from tokenmill.builder.passes.split_rope import split_rope
from tokenmill.errors import InvalidParameterError, did_you_mean

__all__ = ["PASSES", "GraphPass", "PassReport", "Target", "run_passes"]

PassFunction: TypeAlias = Callable[[Graph, Target], tuple[Graph, list[str]]]


@dataclass(frozen=True, slots=True)
class GraphPass:
    """A pass as users see it.

    Args:
        name: what `--disable-pass` takes.
        description: one line.
        function: does it.
    """

    name: str
    description: str
    function: PassFunction


PASSES: Final = tuple(
    GraphPass(function.__name__, description, function)
    for function, description in (
        (fold_constants, "compute what depends on weights alone, and give factors to the nodes that can take them"),
        (simplify_views, "read values, not slices of concatenations of them"),
        (split_rope, "rotate query and key by a node each"),
        (eliminate_dead_code, "drop what nothing needs"),
        (select_rows_early, "compute the last layer only for the tokens whose logits are wanted"),
        (fuse_bias, "add biases in the epilogue of products"),
        (merge_qkv, "query, key and value projections in one product"),
        (merge_gate_up, "gate and up projections in one product"),
        (fuse_rope_cache_write, "head norms, rotations and the write to the cache in one pass"),
        (fuse_gated_activation, "SwiGLU and GeGLU in the epilogue of products"),
        (fuse_residual, "add the residual stream in the epilogue of products"),
        (fuse_add_norm, "add and normalize in one pass"),
        (quantize_activations, "int8 inputs for products with quantized weights"),
        (fuse_norm_quantize, "quantize in the pass of the norm"),
        (fuse_activation_quantize, "quantize in the pass of the gated activation"),
    )
)
"""All passes, in the order in which they run."""


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did.

    Args:
        name: of the pass.
        changes: a line each; empty if there was nothing to do.
        before, after: the graphs.
    """

    name: str
    changes: tuple[str, ...]
    before: Graph
    after: Graph

    def diff(self) -> str:
        """The change as a unified diff of the graphs' texts; empty if nothing changed."""
        return diff(self.before, self.after)


def run_passes(
    graph: Graph, *, disabled: Collection[str] = (), target: Target | None = None
) -> tuple[Graph, list[PassReport]]:
    """Apply all passes but the `disabled` ones.

    Args:
        graph: captured, with the formats of its weights.
        disabled: names of passes.
        target: what the executor can do; without one, nothing is quantized.

    Raises:
        InvalidParameterError: there is no pass of a disabled name (`field` is `disabled_passes`).
    """
    names = [one.name for one in PASSES]
    for name in disabled:
        if name not in names:
            raise InvalidParameterError(
                f"There is no pass '{name}'.", field="disabled_passes", remedy=did_you_mean(name, names)
            )
    reports = []
    for one in PASSES:
        if one.name in disabled:
            continue
        after, changes = one.function(graph, target or Target())
        reports.append(PassReport(one.name, tuple(changes), graph, after))
        graph = after
    graph.check()
    return graph, reports
