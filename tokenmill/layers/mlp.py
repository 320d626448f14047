"""`GatedMLP`: `down(activation(gate(x)) * up(x))`, the feed-forward block of every model so far."""

from __future__ import annotations

import torch
from torch import nn

from tokenmill.layers.context import LayerContext
from tokenmill.layers.linear import MergedColumnLinear, RowParallelLinear
from tokenmill.ops.activation import gated_activation, gated_activation_fp8
from tokenmill.ops.row_product import PendingNorm
from tokenmill.quantization.base import RowForm, Rows


class GatedMLP(nn.Module):
    """Feed-forward block with a gate, the gate and up projections in one product.

    Args:
        hidden_size: features of input and output.
        intermediate_size: features between.
        activation: Hugging Face name of the gate's activation.
        bias: whether the projections have one.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str, *, bias: bool, context: LayerContext
    ) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = MergedColumnLinear(
            hidden_size, parts, bias=bias, context=context.child("gate_up_proj"), what="MLP features"
        )
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, bias=bias, context=context.child("down_proj"), what="MLP features"
        )
        self._activation_name = activation
        self.activation = gated_activation(activation, context.device, context.dtype)
        self.quantized_activation = gated_activation_fp8(activation, context.device, context.dtype)

    def row_form(self, x: torch.Tensor) -> RowForm:
        """The form in which rows like x [T, hidden_size] are best given."""
        return self.gate_up_proj.row_form(x)

    def forward(self, x: Rows, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """[T, hidden_size] to [T, hidden_size]; `add_to`: see `RowParallelLinear`."""
        if isinstance(x, PendingNorm) or (isinstance(x, torch.Tensor) and self.row_form(x) is RowForm.PENDING_NORM):
            return self.down_proj(self.gate_up_proj.activated(x, self._activation_name))  # type: ignore[no-any-return]
        gate_up = self.gate_up_proj(x)
        is_quantized = self.down_proj.row_form(gate_up) is RowForm.QUANTIZED
        activated = self.quantized_activation(gate_up) if is_quantized else self.activation(gate_up)
        return self.down_proj(activated, add_to)  # type: ignore[no-any-return]
