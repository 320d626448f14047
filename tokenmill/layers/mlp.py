"""`GatedMLP`: `down(activation(gate(x)) * up(x))`, the feed-forward block of every model so far."""

from __future__ import annotations

import torch
from torch import nn

from tokenmill.layers.context import LayerContext
from tokenmill.layers.linear import MergedColumnLinear, RowParallelLinear
from tokenmill.ops.activation import gated_activation


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
        self.activation = gated_activation(activation, context.device, context.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] to [T, hidden_size]."""
        return self.down_proj(self.activation(self.gate_up_proj(x)))  # type: ignore[no-any-return]
