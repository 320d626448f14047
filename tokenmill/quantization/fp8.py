"""`Fp8Linear`, `Fp8Experts`: weights in float8_e4m3fn with a scale for each output feature, made from any checkpoint.

One row (a single sequence's decode) is multiplied as it is; more rows are quantized, with a scale for each of them. On
an H100 one row of an 8B model's layer takes 84 us the first way and 95 us the second, sixteen rows 105 us and 96 us
(docs/log.md, 2026-11-22). Memory never holds more than the float8 weights and one block of a tensor beside them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from tokenmill.ops.fp8 import (
    FP8_DTYPE,
    Fp8Weight,
    QuantizedRows,
    add_product,
    adds_product,
    per_token_quantize_fp8,
    scaled_linear,
    weight_only_linear,
)
from tokenmill.ops.moe import ExpertMatrix, ExpertWeights, Routing, expert_products
from tokenmill.ops.row_product import OneRow, can_fuse, row_product
from tokenmill.quantization.base import Added, ExpertParameter, ExpertProjection, ExpertSizes, ParameterAxes, RowForm
from tokenmill.quantization.unquantized import register_experts

BLOCK_ELEMENTS = 16 * 2**20
"""Weights that are converted at a time: what is in memory twice."""


class Fp8Linear:
    """A weight of 8-bit floats: `weight` [out_features, in_features] and `weight_scale` [out_features] on its layer.

    Args:
        batch_invariant: see `ops.fp8.Fp8Weight`.
    """

    def __init__(self, *, batch_invariant: bool = False) -> None:
        self._batch_invariant = batch_invariant
        self._weight: Fp8Weight | None = None

    def create_weights(
        self, layer: nn.Module, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, ParameterAxes]:
        """Register the parameter `weight`, which a checkpoint fills through `store`, and the buffer `weight_scale`."""
        values = torch.empty(out_features, in_features, dtype=FP8_DTYPE, device=device)
        layer.register_parameter("weight", nn.Parameter(values, requires_grad=False))
        layer.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        return {"weight": ParameterAxes(output=0, input=1)}

    def store(self, layer: nn.Module, name: str, start: int, tensor: torch.Tensor) -> None:
        """Quantize `tensor` [features, in_features] into the output features from `start`."""
        assert name == "weight", f"there is no parameter '{name}' to fill"
        values, scales = layer.get_parameter("weight").data, layer.get_buffer("weight_scale")
        rows_per_block = max(1, BLOCK_ELEMENTS // tensor.shape[1])
        for first in range(0, tensor.shape[0], rows_per_block):
            block = tensor[first : first + rows_per_block].to(values.device)
            quantized = per_token_quantize_fp8(block)
            rows = slice(start + first, start + first + block.shape[0])
            values[rows] = quantized.values
            scales[rows] = quantized.scales

    def process_after_loading(self, layer: nn.Module) -> None:
        """Join values and scales. A second call changes nothing."""
        values = layer.get_parameter("weight").data
        rows = QuantizedRows(values, layer.get_buffer("weight_scale"))
        self._weight = Fp8Weight.of(rows, batch_invariant=self._batch_invariant)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[T, in_features] to [T, out_features]."""
        if self._quantizes(x.shape[0]):
            return self.apply_quantized(per_token_quantize_fp8(x), bias, x.dtype)
        return weight_only_linear(x, self._filled, bias)

    def row_form(self, x: torch.Tensor) -> RowForm:
        """Quantized rows if they are more than one, else one before its norm where the product includes it."""
        if self._quantizes(x.shape[0]):
            return RowForm.QUANTIZED
        return RowForm.PENDING_NORM if can_fuse(x, self._filled.values) else RowForm.PLAIN

    def apply_quantized(self, x: QuantizedRows, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Rows [T, in_features], quantized already, to [T, out_features] of type `dtype`."""
        return scaled_linear(x, self._filled, bias, dtype)

    def adds(self, num_rows: int, dtype: torch.dtype) -> bool:
        """See `ops.fp8.adds_product`."""
        return self._quantizes(num_rows) and adds_product(num_rows, self._filled, dtype)

    def add_product(self, total: torch.Tensor, x: torch.Tensor | QuantizedRows) -> None:
        """Add the product of x [T, in_features] to `total` [T, out_features]."""
        add_product(total, x if isinstance(x, QuantizedRows) else per_token_quantize_fp8(x), self._filled)

    def apply_fused(self, x: OneRow, bias: torch.Tensor | None, activation: str = "") -> torch.Tensor:
        """See `ops.row_product.row_product`."""
        return row_product(x, self._filled.values, self._filled.scales, bias, activation)

    def _quantizes(self, num_rows: int) -> bool:
        return num_rows != 1 or self._batch_invariant

    @property
    def _filled(self) -> Fp8Weight:
        assert self._weight is not None, "process_after_loading was not called"
        return self._weight


class FilledExperts:
    """Experts whose weights are there once they are loaded, and what is computed with them then.

    Args:
        batch_invariant: see `ops.moe.ExpertWeights`.
    """

    def __init__(self, *, batch_invariant: bool = False) -> None:
        self._batch_invariant = batch_invariant
        self._weights: ExpertWeights | None = None

    def apply(self, x: torch.Tensor, routing: Routing) -> Added:
        """[T, H] to [T, H]."""
        return expert_products(x, routing, self._filled)

    def row_form(self, x: torch.Tensor) -> RowForm:
        """Plain rows for the router, and quantized ones where the experts quantize them row by row."""
        return RowForm.PLAIN_AND_QUANTIZED if self._filled.takes_quantized(x.shape[0]) else RowForm.PLAIN

    def apply_quantized(self, x: torch.Tensor, quantized: QuantizedRows, routing: Routing) -> Added:
        """[T, H] to [T, H], with x quantized already."""
        return expert_products(x, routing, self._filled, quantized)

    @property
    def _filled(self) -> ExpertWeights:
        assert self._weights is not None, "process_after_loading was not called"
        return self._weights


class Fp8Experts(FilledExperts):
    """Experts in 8-bit floats: `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I] with `..._scale` [E, features].

    Args:
        batch_invariant: see `ops.moe.ExpertWeights`.
    """

    def __init__(self, *, batch_invariant: bool = False) -> None:
        super().__init__(batch_invariant=batch_invariant)
        self._stacks: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def create_weights(
        self, layer: nn.Module, sizes: ExpertSizes, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, ExpertParameter]:
        """Register the parameters, which a checkpoint fills through `store`, and the buffers of scales."""
        gate_up, down = register_experts(layer, sizes, FP8_DTYPE, device)
        for name, stack in (("gate_up_proj", gate_up), ("down_proj", down)):
            layer.register_buffer(f"{name}_scale", torch.ones(stack.shape[:2], dtype=torch.float32, device=device))
        gate, up = gate_up.chunk(2, dim=1)
        gate_scale, up_scale = layer.get_buffer("gate_up_proj_scale").chunk(2, dim=1)
        down_scale = layer.get_buffer("down_proj_scale")
        self._stacks = {"gate": (gate, gate_scale), "up": (up, up_scale), "down": (down, down_scale)}
        return {"weight": ExpertParameter(gate, up, down, ParameterAxes(output=0, input=1))}

    def store(self, name: str, projection: ExpertProjection, expert: int, tensor: torch.Tensor) -> None:
        """Quantize `tensor`, one projection of one expert."""
        assert name == "weight", f"there is no parameter '{name}' to fill"
        values, scales = self._stacks[projection]
        quantized = per_token_quantize_fp8(tensor.to(values.device))
        values[expert] = quantized.values
        scales[expert] = quantized.scales

    def process_after_loading(self, layer: nn.Module, activation: str, first_expert: int) -> None:
        """Join values and scales. A second call changes nothing."""
        self._stacks = {}
        self._weights = ExpertWeights(
            ExpertMatrix(layer.get_parameter("gate_up_proj").data, layer.get_buffer("gate_up_proj_scale")),
            ExpertMatrix(layer.get_parameter("down_proj").data, layer.get_buffer("down_proj_scale")),
            activation,
            first_expert,
            batch_invariant=self._batch_invariant,
        )
