"""Linear layers, declared by how they split over the ranks of a group; what the weight looks like is the method's.

A column-parallel layer holds some of the output features on each rank, a row-parallel one some of the input features
(https://arxiv.org/abs/1909.08053). Merged layers compute several projections of the checkpoint in one product and list
one weight target for each of them. Models call them; `quantization` stores and applies their weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from tokenmill.errors import UnsupportedFeatureError
from tokenmill.layers.context import LayerContext
from tokenmill.layers.weights import Shard, WeightTarget, join_name
from tokenmill.ops.fp8 import QuantizedRows
from tokenmill.ops.row_product import OneRow, PendingNorm
from tokenmill.quantization.base import (
    AddsProduct,
    ConvertsWhileLoading,
    FusesOneRow,
    ParameterAxes,
    RowForm,
    Rows,
    TakesQuantizedRows,
)


@dataclass(frozen=True, slots=True)
class OutputPart:
    """One projection inside a merged layer, in output features.

    Args:
        name: the projection's name in checkpoints, beside the merged module.
        size: features of it on this rank.
        source_start: this rank's first feature in the checkpoint.
        source_size: features of it in the checkpoint.
    """

    name: str
    size: int
    source_start: int
    source_size: int


class LinearBase(nn.Module):
    """A weight held by a `LinearMethod`, an optional bias, and weight targets for both.

    Args:
        in_features, out_features: of this rank.
        bias: whether a bias of `out_features` is added.
        context: names the method and the group.
        source_inputs: (first, number of all) input features of the checkpoint, if this rank holds only some of them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        context: LayerContext,
        source_inputs: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group = context.group
        self.dtype = context.dtype
        self.method = context.linear_method(context.prefix)
        self._quantized_method = self.method if isinstance(self.method, TakesQuantizedRows) else None
        self._fusing_method = self.method if isinstance(self.method, FusesOneRow) else None
        self._adding_method = self.method if isinstance(self.method, AddsProduct) else None
        axes = dict(self.method.create_weights(self, in_features, out_features, context.dtype, context.device))
        self.bias: nn.Parameter | None = None
        if bias:
            zeros = torch.zeros(out_features, dtype=context.dtype, device=context.device)
            self.bias = nn.Parameter(zeros, requires_grad=False)
            axes["bias"] = ParameterAxes(output=0, input=None)
        self._axes: Mapping[str, ParameterAxes] = axes
        self._source_inputs = source_inputs

    def finalize_weights(self) -> None:
        """Let the method prepare the filled weight."""
        self.method.process_after_loading(self)

    def row_form(self, x: torch.Tensor) -> RowForm:
        """The form in which rows like x [T, ...], of its number, type and device, are best given."""
        return self.method.row_form(x)

    def _product(self, x: Rows, bias: torch.Tensor | None) -> torch.Tensor:
        """[T, in_features] to [T, out_features]."""
        if isinstance(x, PendingNorm):
            assert self._fusing_method is not None, "this row's norm was left to another layer"
            return self._fusing_method.apply_fused(x, bias)
        if isinstance(x, QuantizedRows):
            assert self._quantized_method is not None, "these rows are quantized for another layer"
            return self._quantized_method.apply_quantized(x, bias, self.dtype)
        return self.method.apply(x, bias)

    def _part_targets(self, part: OutputPart, start: int, prefix: str) -> Iterator[tuple[str, WeightTarget]]:
        """Targets for one projection that begins at this rank's output feature `start`."""
        for name, axes in self._axes.items():
            destination, shard = self.get_parameter(name).data, None
            if axes.output is not None:
                # A packed axis holds several features in one element: offsets shrink by the same factor.
                per_element = self.out_features // destination.shape[axes.output]
                if part.size != self.out_features and (start % per_element or part.size % per_element):
                    raise UnsupportedFeatureError(
                        f"'{name}' has an entry for each {per_element} features, which do not end with {prefix}.",
                        field="model",
                    )
                destination = destination.narrow(axes.output, start // per_element, part.size // per_element)
                if part.size != part.source_size:
                    shard = Shard(axes.output, part.source_start // per_element, part.source_size // per_element)
            if axes.input is not None and self._source_inputs is not None:
                per_element = self.in_features // destination.shape[axes.input]
                first, full_size = self._source_inputs
                shard = Shard(axes.input, first // per_element, full_size // per_element)
            store = None
            if name != "bias" and isinstance(self.method, ConvertsWhileLoading):
                store = partial(self.method.store, self, name, start)
            yield join_name(prefix, name), WeightTarget(destination, shard, store)


class MergedColumnLinear(LinearBase):
    """Several projections of one input in one product, each split by output features over the ranks.

    Args:
        in_features: features of the input.
        parts: name and full output size of each projection, in the order of the output.
        bias: whether the projections have one.
        what: what the output features are, for the error when they cannot be divided.
    """

    def __init__(
        self, in_features: int, parts: Mapping[str, int], *, bias: bool, context: LayerContext, what: str = "features"
    ) -> None:
        rank, group = context.group.rank, context.group
        sizes = {name: group.shard_size(size, what) for name, size in parts.items()}
        super().__init__(in_features, sum(sizes.values()), bias=bias, context=context)
        self._parts = [OutputPart(name, sizes[name], rank * sizes[name], parts[name]) for name in parts]

    def forward(self, x: Rows) -> torch.Tensor:
        """[T, in_features] to [T, this rank's output features], the projections side by side."""
        return self._product(x, self.bias)

    def activated(self, x: OneRow, activation: str) -> torch.Tensor:
        """[1, in_features] to [1, half of the output features]: two projections, gated. For `RowForm.PENDING_NORM`."""
        assert self._fusing_method is not None, "`row_form` was not asked"
        return self._fusing_method.apply_fused(x, self.bias, activation)

    def named_weight_targets(self, prefix: str) -> Iterator[tuple[str, WeightTarget]]:
        """One weight (and bias) for each projection, named beside this module."""
        yield from _merged_targets(self, self._parts, prefix)


class QKVLinear(LinearBase):
    """Query, key and value projections in one product, split by heads over the ranks.

    Key/value heads that are fewer than the ranks are replicated.

    Args:
        hidden_size: features of the input.
        num_heads, num_kv_heads: heads of the whole model.
        head_dim: features of a head.
        bias: whether the projections have one.

    Raises:
        InvalidParameterError: heads cannot be divided over the ranks.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool, context: LayerContext
    ) -> None:
        group = context.group
        rank_heads = group.shard_size(num_heads, "attention heads")
        rank_kv_heads, first_kv_head = split_kv_heads(num_kv_heads, context)
        super().__init__(hidden_size, (rank_heads + 2 * rank_kv_heads) * head_dim, bias=bias, context=context)
        self.num_heads = rank_heads
        self.num_kv_heads = rank_kv_heads
        self.head_dim = head_dim
        query = (rank_heads * head_dim, group.rank * rank_heads * head_dim, num_heads * head_dim)
        key_value = (rank_kv_heads * head_dim, first_kv_head * head_dim, num_kv_heads * head_dim)
        self._parts = [
            OutputPart("q_proj", *query),
            OutputPart("k_proj", *key_value),
            OutputPart("v_proj", *key_value),
        ]

    def forward(self, x: Rows) -> torch.Tensor:
        """[T, hidden_size] to [T, H + 2 G, head_dim]: this rank's query heads, key heads, value heads."""
        product = self._product(x, self.bias)
        return product.view(product.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_dim)

    def named_weight_targets(self, prefix: str) -> Iterator[tuple[str, WeightTarget]]:
        """`q_proj`, `k_proj` and `v_proj`, named beside this module."""
        yield from _merged_targets(self, self._parts, prefix)


class RowParallelLinear(LinearBase):
    """A projection whose input features are split over the ranks; the ranks' products are summed.

    Args:
        in_features, out_features: of the whole layer.
        bias: whether the projection has one.
        what: what the input features are, for the error when they cannot be divided.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, context: LayerContext, what: str = "features"
    ) -> None:
        group = context.group
        rank_features = group.shard_size(in_features, what)
        source = (group.rank * rank_features, in_features) if group.size > 1 else None
        super().__init__(rank_features, out_features, bias=bias, context=context, source_inputs=source)

    def forward(self, x: Rows, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """[T, this rank's input features] to [T, out_features], equal on all ranks.

        Args:
            x: the input.
            add_to: [T, out_features], the residual stream. Where this layer adds in passing it is what is returned,
                with the product added; elsewhere it is left as it is.
        """
        if add_to is not None and self._add_product(add_to, x):
            return add_to
        bias = self.bias if self.group.rank == 0 else None  # added once, not by every rank
        return self.group.all_reduce(self._product(x, bias))

    def _add_product(self, total: torch.Tensor, x: Rows) -> bool:
        """Add the product to `total` if that is possible; whether it was."""
        method = self._adding_method
        if method is None or self.bias is not None or self.group.size > 1 or isinstance(x, PendingNorm):
            return False
        if not method.adds(x.values.shape[0] if isinstance(x, QuantizedRows) else x.shape[0], total.dtype):
            return False
        method.add_product(total, x)
        return True

    def named_weight_targets(self, prefix: str) -> Iterator[tuple[str, WeightTarget]]:
        """The weight and the bias under this module's own name."""
        part = OutputPart("", self.out_features, 0, self.out_features)
        yield from self._part_targets(part, 0, prefix)


def split_kv_heads(num_kv_heads: int, context: LayerContext) -> tuple[int, int]:
    """(key/value heads of this rank, the first of them); with fewer heads than ranks, neighbours share one."""
    group = context.group
    if num_kv_heads < group.size and group.size % num_kv_heads == 0:
        return 1, group.rank * num_kv_heads // group.size
    rank_kv_heads = group.shard_size(num_kv_heads, "key/value heads")
    return rank_kv_heads, group.rank * rank_kv_heads


def _merged_targets(
    layer: MergedColumnLinear | QKVLinear, parts: list[OutputPart], prefix: str
) -> Iterator[tuple[str, WeightTarget]]:
    parent = prefix.rpartition(".")[0]
    start = 0
    for part in parts:
        yield from layer._part_targets(part, start, join_name(parent, part.name))
        start += part.size
