"""`UnquantizedLinear` and `UnquantizedExperts`: plain matrices, prepared for their device where that is faster."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from tokenmill.ops.fp8 import QuantizedRows
from tokenmill.ops.linear import PackedWeight, StreamedWeight, add_product, adds_product, linear, pack_linear_weight
from tokenmill.ops.moe import ExpertMatrix, ExpertWeights, Routing, expert_products
from tokenmill.ops.row_product import OneRow, can_fuse, row_product
from tokenmill.quantization.base import Added, ExpertParameter, ExpertSizes, ParameterAxes, RowForm


class UnquantizedLinear:
    """A weight [out_features, in_features] in the model's own type.

    Args:
        batch_invariant: see `ops.linear.pack_linear_weight`.
    """

    def __init__(self, *, batch_invariant: bool = False) -> None:
        self._batch_invariant = batch_invariant
        self._plain: torch.Tensor | None = None
        self._weight: torch.Tensor | PackedWeight | StreamedWeight | None = None

    def create_weights(
        self, layer: nn.Module, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, ParameterAxes]:
        """Register `weight` [out_features, in_features] on `layer`."""
        weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device), requires_grad=False)
        layer.register_parameter("weight", weight)
        self.share_weight(weight)
        return {"weight": ParameterAxes(output=0, input=1)}

    def share_weight(self, weight: torch.Tensor) -> None:
        """Use `weight` [out_features, in_features], which belongs to another layer (tied embeddings)."""
        self._plain = weight
        self._weight = weight

    def process_after_loading(self, layer: nn.Module) -> None:
        """Prepare the weight; a plain one that was copied is freed unless another layer owns it. Repeatable."""
        if self._plain is None:
            return
        self._weight = pack_linear_weight(self._plain.data, batch_invariant=self._batch_invariant)
        self._plain = None
        if isinstance(self._weight, PackedWeight) and "weight" in layer._parameters:
            layer.register_parameter("weight", None)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[T, in_features] to [T, out_features]."""
        assert self._weight is not None, "create_weights was not called"
        return linear(x, self._weight, bias)

    def adds(self, num_rows: int, dtype: torch.dtype) -> bool:
        """See `ops.linear.adds_product`."""
        return isinstance(self._weight, StreamedWeight) and adds_product(num_rows, self._weight)

    def add_product(self, total: torch.Tensor, x: torch.Tensor | QuantizedRows) -> None:
        """Add the product of x [T, in_features] to `total` [T, out_features]."""
        assert isinstance(self._weight, StreamedWeight) and isinstance(x, torch.Tensor), "`adds` was not asked"
        add_product(total, x, self._weight)

    def row_form(self, x: torch.Tensor) -> RowForm:
        """Plain rows, or one before its norm where the product includes it."""
        if self._batch_invariant or not isinstance(self._weight, StreamedWeight):
            return RowForm.PLAIN
        return RowForm.PENDING_NORM if can_fuse(x, self._weight.data) else RowForm.PLAIN

    def apply_fused(self, x: OneRow, bias: torch.Tensor | None, activation: str = "") -> torch.Tensor:
        """See `ops.row_product.row_product`."""
        assert isinstance(self._weight, StreamedWeight), "`row_form` was not asked"
        return row_product(x, self._weight.data, None, bias, activation)


def unquantized(name: str) -> UnquantizedLinear:
    """A `LinearMethodFactory`: every layer is unquantized."""
    return UnquantizedLinear()


class UnquantizedExperts:
    """`gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I] in the model's own type.

    Args:
        batch_invariant: see `ops.moe.ExpertWeights`.
    """

    def __init__(self, *, batch_invariant: bool = False) -> None:
        self._batch_invariant = batch_invariant
        self._weights: ExpertWeights | None = None

    def create_weights(
        self, layer: nn.Module, sizes: ExpertSizes, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, ExpertParameter]:
        """Register both parameters on `layer`."""
        gate_up, down = register_experts(layer, sizes, dtype, device)
        gate, up = gate_up.chunk(2, dim=1)
        return {"weight": ExpertParameter(gate, up, down, ParameterAxes(output=0, input=1))}

    def process_after_loading(self, layer: nn.Module, activation: str, first_expert: int) -> None:
        """Prepare the weights; plain ones that were copied are freed. Repeatable."""
        if self._weights is not None:
            return
        gate_up, down = layer.get_parameter("gate_up_proj").data, layer.get_parameter("down_proj").data
        self._weights = ExpertWeights(
            ExpertMatrix(gate_up),
            ExpertMatrix(down),
            activation,
            first_expert,
            batch_invariant=self._batch_invariant,
        ).prepared()
        if self._weights.packed is not None:
            layer.register_parameter("gate_up_proj", None)
            layer.register_parameter("down_proj", None)

    def row_form(self, x: torch.Tensor) -> RowForm:
        """Plain rows."""
        return RowForm.PLAIN

    def apply(self, x: torch.Tensor, routing: Routing) -> Added:
        """[T, H] to [T, H]."""
        assert self._weights is not None, "process_after_loading was not called"
        return expert_products(x, routing, self._weights)


def register_experts(
    layer: nn.Module, sizes: ExpertSizes, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """New parameters `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I] of `layer`."""
    num_experts, hidden, size = sizes
    gate_up = torch.empty(num_experts, 2 * size, hidden, dtype=dtype, device=device)
    down = torch.empty(num_experts, hidden, size, dtype=dtype, device=device)
    layer.register_parameter("gate_up_proj", nn.Parameter(gate_up, requires_grad=False))
    layer.register_parameter("down_proj", nn.Parameter(down, requires_grad=False))
    return gate_up, down


def unquantized_experts(name: str) -> UnquantizedExperts:
    """An `ExpertsMethodFactory`: all experts are unquantized."""
    return UnquantizedExperts()
