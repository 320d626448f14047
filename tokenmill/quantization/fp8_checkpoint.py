"""Float8 weights as checkpoints hold them: with a scale for each matrix, output feature, or block of 128 x 128.

A scale of a matrix is a scale of each of its output features, so that merged projections with scales of their own
become one weight, and the products are those of `Fp8Linear`. Inputs are scaled token by token, or by the scale that the
checkpoint gives; a single row is not quantized. `checkpoint_format` says which it is, `select` makes the methods.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from tokenmill.errors import UnsupportedFeatureError
from tokenmill.ops.block_fp8 import BlockScaledWeight, block_scaled_linear
from tokenmill.ops.fp8 import (
    FP8_DTYPE,
    Fp8Weight,
    QuantizedRows,
    add_product,
    adds_product,
    per_token_quantize_fp8,
    scaled_linear,
    static_quantize_fp8,
    weight_only_linear,
)
from tokenmill.ops.moe import ExpertMatrix, ExpertWeights
from tokenmill.ops.moe_plan import SCALE_GROUP
from tokenmill.quantization.base import ExpertParameter, ExpertSizes, ParameterAxes, RowForm
from tokenmill.quantization.checkpoint_format import Fp8Format
from tokenmill.quantization.fp8 import FilledExperts
from tokenmill.quantization.unquantized import register_experts

_BOTH_AXES = ParameterAxes(output=0, input=1)
_NO_AXES = ParameterAxes(output=None, input=None)


class ScaledFp8Linear:
    """`weight` [O, I] float8 with `weight_scale` for each of its projections or features, and maybe `input_scale`.

    Args:
        stored: the checkpoint's format.
        batch_invariant: give each row the same bits in any company.
    """

    def __init__(self, stored: Fp8Format, *, batch_invariant: bool = False) -> None:
        self._batch_invariant = batch_invariant
        self._format = stored
        self._scales: dict[str, dict[int, torch.Tensor]] = {}
        self._weight: Fp8Weight | None = None
        self._input_scale: torch.Tensor | None = None

    def create_weights(
        self, layer: nn.Module, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, ParameterAxes]:
        """Register the parameters that a checkpoint fills through `store`; scales of matrices are kept beside them."""
        stored = self._format
        values = torch.empty(out_features, in_features, dtype=FP8_DTYPE, device=device)
        layer.register_parameter("weight", nn.Parameter(values, requires_grad=False))
        axes = {"weight": _BOTH_AXES}
        if stored.weight_scales == "feature":
            shape = (out_features, *stored.scale_shape[1:])
            axes[stored.scale_name] = ParameterAxes(output=0, input=None)
        else:
            shape = stored.scale_shape
            axes[stored.scale_name] = _NO_AXES
        _register_scale(layer, stored.scale_name, shape, device)
        if stored.static_inputs:
            shape = stored.scale_shape if stored.weight_scales == "matrix" else ()
            _register_scale(layer, "input_scale", shape, device)
            axes["input_scale"] = _NO_AXES
        return axes

    def store(self, layer: nn.Module, name: str, start: int, tensor: torch.Tensor) -> None:
        """Copy a projection's weight to the output features from `start`; note its scale."""
        values = layer.get_parameter("weight").data
        if name == "weight":
            values[start : start + tensor.shape[0]].copy_(tensor)
        else:
            self._scales.setdefault(name, {})[start] = tensor.to(values.device, torch.float32).reshape(-1)

    def process_after_loading(self, layer: nn.Module) -> None:
        """Join values and scales. A second call changes nothing."""
        if self._weight is not None:
            return
        values = layer.get_parameter("weight").data
        parts = sorted(self._scales.get(self._format.scale_name, {}).items())
        scales = torch.ones(values.shape[0], dtype=torch.float32, device=values.device)
        for start, part in parts:  # a scale of a matrix is good to where the next one begins
            scales[start : None if part.numel() == 1 else start + part.numel()] = part
        self._weight = Fp8Weight.of(QuantizedRows(values, scales), batch_invariant=self._batch_invariant)
        if self._format.static_inputs:
            # Merged projections see one input; with the largest scale nothing is cut off that one of them would keep.
            given = list(self._scales.get("input_scale", {}).values())
            self._input_scale = torch.cat(given or [scales[:1]]).amax().reshape(1)
        self._scales = {}
        for name in (self._format.scale_name, "input_scale"):
            if name in layer._parameters:
                layer.register_parameter(name, None)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[T, in_features] to [T, out_features]."""
        assert self._weight is not None, "process_after_loading was not called"
        if x.shape[0] == 1 and not self._batch_invariant:
            return weight_only_linear(x, self._weight, bias)
        return scaled_linear(self._quantized(x), self._weight, bias, x.dtype)

    def adds(self, num_rows: int, dtype: torch.dtype) -> bool:
        """See `ops.fp8.adds_product`."""
        assert self._weight is not None, "process_after_loading was not called"
        return num_rows != 1 and adds_product(num_rows, self._weight, dtype)

    def add_product(self, total: torch.Tensor, x: torch.Tensor | QuantizedRows) -> None:
        """Add the product of x [T, in_features] to `total` [T, out_features]."""
        assert self._weight is not None, "process_after_loading was not called"
        add_product(total, x if isinstance(x, QuantizedRows) else self._quantized(x), self._weight)

    def _quantized(self, x: torch.Tensor) -> QuantizedRows:
        return per_token_quantize_fp8(x) if self._input_scale is None else static_quantize_fp8(x, self._input_scale)

    def row_form(self, x: torch.Tensor) -> RowForm:
        """Quantized rows where `apply` quantizes them, each with a scale of its own."""
        is_quantized = (x.shape[0] != 1 or self._batch_invariant) and not self._format.static_inputs
        return RowForm.QUANTIZED if is_quantized else RowForm.PLAIN

    def apply_quantized(self, x: QuantizedRows, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Rows [T, in_features], quantized already, to [T, out_features] of type `dtype`."""
        assert self._weight is not None, "process_after_loading was not called"
        return scaled_linear(x, self._weight, bias, dtype)


class BlockFp8Linear:
    """`weight` [O, I] float8 with a scale for each block of 128 x 128.

    Args:
        stored: the checkpoint's format.
        batch_invariant: give each row the same bits in any company.
    """

    def __init__(self, stored: Fp8Format, *, batch_invariant: bool = False) -> None:
        self._batch_invariant = batch_invariant
        self._scale_name = stored.scale_name
        self._weight: BlockScaledWeight | None = None

    def create_weights(
        self, layer: nn.Module, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, ParameterAxes]:
        """Register both parameters."""
        values = torch.empty(out_features, in_features, dtype=FP8_DTYPE, device=device)
        layer.register_parameter("weight", nn.Parameter(values, requires_grad=False))
        _register_scale(layer, self._scale_name, (_num_blocks(out_features), _num_blocks(in_features)), device)
        return {"weight": _BOTH_AXES, self._scale_name: _BOTH_AXES}

    def process_after_loading(self, layer: nn.Module) -> None:
        """Join values and scales. A second call changes nothing."""
        values, scales = layer.get_parameter("weight").data, layer.get_parameter(self._scale_name).data
        self._weight = BlockScaledWeight.of(values, scales, batch_invariant=self._batch_invariant)

    def row_form(self, x: torch.Tensor) -> RowForm:
        """Plain rows: `apply` quantizes them with a scale for each block of features."""
        return RowForm.PLAIN

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[T, in_features] to [T, out_features]."""
        assert self._weight is not None, "process_after_loading was not called"
        return block_scaled_linear(x, self._weight, bias)


class CheckpointFp8Experts(FilledExperts):
    """Experts in float8 with the checkpoint's scales.

    Static scales of inputs: one for what all experts' gate and up projections take, since a token goes to several of
    them, and one for what the down projections take. The largest counts, so that nothing is cut off that one of them
    would keep.

    Args:
        stored: the checkpoint's format.
        batch_invariant: give each row the same bits in any company.
    """

    def __init__(self, stored: Fp8Format, *, batch_invariant: bool = False) -> None:
        super().__init__(batch_invariant=batch_invariant)
        self._format = stored
        self._scales: tuple[torch.Tensor, torch.Tensor] | None = None
        self._input_scales: tuple[torch.Tensor, torch.Tensor] | None = None

    def create_weights(
        self, layer: nn.Module, sizes: ExpertSizes, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, ExpertParameter]:
        """Register the values; scales lie beside them.

        Raises:
            UnsupportedFeatureError: blocks do not end where a projection or a rank's part of it does.
        """
        stored, (num_experts, hidden, size) = self._format, sizes
        gate_up, down = register_experts(layer, sizes, FP8_DTYPE, device)
        gate, up = gate_up.chunk(2, dim=1)
        found = {"weight": ExpertParameter(gate, up, down, _BOTH_AXES)}
        if stored.weight_scales == "block":
            if size % SCALE_GROUP:
                raise UnsupportedFeatureError(
                    f"Experts of {size} features do not consist of whole blocks of {SCALE_GROUP}.", field="model"
                )
            both_shape: tuple[int, ...] = (2 * _num_blocks(size), _num_blocks(hidden))
            down_shape: tuple[int, ...] = (_num_blocks(hidden), _num_blocks(size))
            axes = _BOTH_AXES
        elif stored.weight_scales == "feature":
            both_shape, down_shape = ((count, *stored.scale_shape[1:]) for count in (2 * size, hidden))
            axes = ParameterAxes(output=0, input=None)
        else:
            both_shape, down_shape, axes = (2, *stored.scale_shape), stored.scale_shape, _NO_AXES
        both = torch.ones(num_experts, *both_shape, dtype=torch.float32, device=device)
        of_down = torch.ones(num_experts, *down_shape, dtype=torch.float32, device=device)
        of_gate, of_up = both.unbind(1) if stored.weight_scales == "matrix" else both.chunk(2, dim=1)
        self._scales = both, of_down
        found[stored.scale_name] = ExpertParameter(of_gate, of_up, of_down, axes)
        if stored.static_inputs:
            shape = stored.scale_shape if stored.weight_scales == "matrix" else ()
            of_x = torch.ones(2, num_experts, *shape, dtype=torch.float32, device=device)
            of_inner = torch.ones(num_experts, *shape, dtype=torch.float32, device=device)
            self._input_scales = of_x, of_inner
            found["input_scale"] = ExpertParameter(of_x[0], of_x[1], of_inner, _NO_AXES)
        return found

    def process_after_loading(self, layer: nn.Module, activation: str, first_expert: int) -> None:
        """Join values and scales. A second call changes nothing."""
        if self._scales is None:
            return
        matrices = []
        for name, scales in zip(("gate_up_proj", "down_proj"), self._scales, strict=True):
            values = layer.get_parameter(name).data
            num_experts, num_features = values.shape[:2]
            if self._format.weight_scales != "block":
                parts = scales.reshape(num_experts, -1)
                scales = parts.repeat_interleave(num_features // parts.shape[1], dim=1)
            matrices.append(ExpertMatrix(values, scales.contiguous()))
        input_scales = None
        if self._input_scales is not None:
            of_x, of_inner = self._input_scales
            input_scales = of_x.amax().reshape(1), of_inner.amax().reshape(1)
        self._weights = ExpertWeights(
            matrices[0],
            matrices[1],
            activation,
            first_expert,
            input_scales,
            batch_invariant=self._batch_invariant,
        )
        self._scales = self._input_scales = None


def _register_scale(layer: nn.Module, name: str, shape: tuple[int, ...], device: torch.device) -> None:
    scale = torch.ones(shape, dtype=torch.float32, device=device)
    layer.register_parameter(name, nn.Parameter(scale, requires_grad=False))


def _num_blocks(num_features: int) -> int:
    return -(-num_features // SCALE_GROUP)
