"""`UnquantizedLinear`: a plain weight matrix, prepared for its device after loading where that is faster."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from tokenmill.ops.linear import PackedWeight, StreamedWeight, linear, pack_linear_weight
from tokenmill.quantization.base import ParameterAxes


class UnquantizedLinear:
    """A weight [out_features, in_features] in the model's own type."""

    def __init__(self) -> None:
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
        self._weight = pack_linear_weight(self._plain.data)
        self._plain = None
        if isinstance(self._weight, PackedWeight) and "weight" in layer._parameters:
            layer.register_parameter("weight", None)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[T, in_features] to [T, out_features]."""
        assert self._weight is not None, "create_weights was not called"
        return linear(x, self._weight, bias)


def unquantized(name: str) -> UnquantizedLinear:
    """A `LinearMethodFactory`: every layer is unquantized."""
    return UnquantizedLinear()
