"""float8_e4m3fn with a scale for each row: quantization, and products with a weight stored so.

A row is a token of an activation or an output feature of a weight: both are quantized by the same function. Products
come in two kinds: `weight_only_linear` leaves the activation in its own type, `scaled_linear` takes it quantized.
Called by `quantization.fp8`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from tokenmill.ops.library_product import add_scaled_product, adds_scaled_product
from tokenmill.ops.linear import new_arrivals
from tokenmill.ops.linear_plan import invariant_plan, matvec_plan, small_batch_plan

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
INVERSE_FP8_MAX = 1.0 / FP8_MAX
LIBRARY_ALIGNMENT = 16
"""`torch._scaled_mm` takes features in multiples of this only."""


class QuantizedRows(NamedTuple):
    """Rows [T, D] as values [T, D] float8_e4m3fn times scales [T] float32."""

    values: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight [O, I] as values times scales.

    Args:
        values: [O, I] float8_e4m3fn, contiguous.
        scales: [O] float32.
        arrivals: `linear.new_arrivals`; belongs to this weight alone.
        batch_invariant: give each row the same bits whatever the number of rows. Single rows are quantized, too, then.
    """

    values: torch.Tensor
    scales: torch.Tensor
    arrivals: torch.Tensor
    batch_invariant: bool = False

    @classmethod
    def of(cls, rows: QuantizedRows, *, batch_invariant: bool = False) -> Fp8Weight:
        """The weight whose output features are `rows`.

        Filling the counters is a launch that waits for the quantization to be complete, as the kernels require that
        read weights before they wait for the kernels before them (`ops.triton.launch`).
        """
        return cls(rows.values, rows.scales, new_arrivals(rows.values), batch_invariant)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[O, I] in `dtype`."""
        return (self.values.float() * self.scales[:, None]).to(dtype)


def per_token_quantize_fp8(x: torch.Tensor) -> QuantizedRows:
    """Quantize each row of x [T, D] so that its largest magnitude becomes 448."""
    return IMPLEMENTATIONS["per_token_quantize"][choose(x.device, x.dtype)](x)  # type: ignore[no-any-return]


def static_quantize_fp8(x: torch.Tensor, scale: torch.Tensor) -> QuantizedRows:
    """Quantize x [T, D] with one scale [1] float32 that was found beforehand; what is out of range becomes +-448."""
    return IMPLEMENTATIONS["static_quantize"][choose(x.device, x.dtype)](x, scale)  # type: ignore[no-any-return]


def weight_only_linear(x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias` with x [T, I] as it is; [T, O] of x's type."""
    return IMPLEMENTATIONS["weight_only_linear"][choose(x.device, x.dtype)](x, weight, bias)  # type: ignore[no-any-return]


def scaled_linear(x: QuantizedRows, weight: Fp8Weight, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`x @ weight.T + bias` with x [T, I] quantized; [T, O] of type `dtype`."""
    return IMPLEMENTATIONS["scaled_linear"][choose(x.values.device, dtype)](x, weight, bias, dtype)  # type: ignore[no-any-return]


def adds_product(num_rows: int, weight: Fp8Weight, dtype: torch.dtype) -> bool:
    """Whether `add_product` is there for so many rows and a sum of type `dtype`: where the library multiplies."""
    out_features, in_features = weight.values.shape
    if weight.batch_invariant or choose(weight.values.device, dtype) != "triton":
        return False
    if small_batch_plan(num_rows, out_features, in_features, 1).kernel != "library":
        return False
    return adds_scaled_product(num_rows, out_features, in_features, dtype)


def add_product(total: torch.Tensor, x: QuantizedRows, weight: Fp8Weight) -> None:
    """Add `x @ weight.T` to `total` [T, O]; the sum is rounded once. `adds_product` says where that is possible."""
    if not add_scaled_product(total, x.values, x.scales, weight.values, weight.scales):
        total.add_(scaled_linear(x, weight, None, total.dtype))


def per_token_quantize_reference(x: torch.Tensor) -> QuantizedRows:
    """The definition: `scale = max|x| / 448`, values rounded to the nearest."""
    x = x.float()
    scales = (x.abs().amax(dim=-1) * INVERSE_FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = x * (1.0 / scales)[:, None]
    return QuantizedRows(scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE), scales)


def static_quantize_reference(x: torch.Tensor, scale: torch.Tensor) -> QuantizedRows:
    """The definition: values rounded to the nearest."""
    scaled = x.float() * (1.0 / scale)
    return QuantizedRows(scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE), scale.expand(x.shape[0]).contiguous())


def weight_only_linear_reference(x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """The definition: a product with the dequantized weight, in float32."""
    product = x.float() @ weight.dequantized(torch.float32).T
    return (product if bias is None else product + bias.float()).to(x.dtype)


def scaled_linear_reference(
    x: QuantizedRows, weight: Fp8Weight, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The definition: a product of the dequantized factors, in float32."""
    return weight_only_linear_reference(x.values.float() * x.scales[:, None], weight, bias).to(dtype)


def per_token_quantize_triton(x: torch.Tensor) -> QuantizedRows:
    """One pass over x."""
    from tokenmill.ops.triton.fp8 import per_token_quantize_fp8 as quantize

    return QuantizedRows(*quantize(x))


def static_quantize_triton(x: torch.Tensor, scale: torch.Tensor) -> QuantizedRows:
    """One pass over x."""
    from tokenmill.ops.triton.fp8 import static_quantize_fp8 as quantize

    return QuantizedRows(*quantize(x, scale))


def weight_only_linear_triton(x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """One row as fast as the weight can be read. Several rows are better quantized: here they cost a wide copy."""
    from tokenmill.ops.triton.matvec import matvec

    if x.shape[0] != 1:
        return functional.linear(x, weight.dequantized(x.dtype), bias)
    x = x if x.stride(1) == 1 else x.contiguous()
    return matvec(x, weight.values, weight.scales, bias, matvec_plan(*weight.values.shape, 1))


def scaled_linear_cuda(
    x: QuantizedRows, weight: Fp8Weight, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Few rows by `ops.triton.linear`, more by cuBLAS; all by one kernel if they shall be invariant."""
    num_rows = x.values.shape[0]
    out_features, in_features = weight.values.shape
    if weight.batch_invariant:
        from tokenmill.ops.triton.linear_invariant import invariant_product

        plan_of_all = invariant_plan(num_rows, out_features, in_features, 1)
        return invariant_product(x.values, x.scales, weight.values, weight.scales, bias, plan_of_all, dtype)
    plan = small_batch_plan(num_rows, out_features, in_features, 1)
    if plan.kernel == "small_batch":
        from tokenmill.ops.triton.linear import small_batch

        return small_batch(x.values, x.scales, weight.values, weight.scales, bias, weight.arrivals, plan, dtype)
    if num_rows == 0 or out_features % LIBRARY_ALIGNMENT or in_features % LIBRARY_ALIGNMENT:
        return functional.linear((x.values.float() * x.scales[:, None]).to(dtype), weight.dequantized(dtype), bias)
    product = torch._scaled_mm(
        x.values,
        weight.values.t(),
        scale_a=x.scales[:, None],
        scale_b=weight.scales[None, :],
        out_dtype=torch.bfloat16,  # the only type that it gives with a scale for each row
        use_fast_accum=True,
    ).to(dtype)
    return product if bias is None else product.add_(bias)


IMPLEMENTATIONS: Mapping[str, Mapping[str, Callable[..., Any]]] = MappingProxyType({
    "per_token_quantize": MappingProxyType(
        {"reference": per_token_quantize_reference, "triton": per_token_quantize_triton}
    ),
    "static_quantize": MappingProxyType({"reference": static_quantize_reference, "triton": static_quantize_triton}),
    "weight_only_linear": MappingProxyType(
        {"reference": weight_only_linear_reference, "triton": weight_only_linear_triton}
    ),
    "scaled_linear": MappingProxyType({"reference": scaled_linear_reference, "triton": scaled_linear_cuda}),
})  # fmt: skip
"""By op, then by implementation."""


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation for activations of this device and type."""
    return "triton" if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) else "reference"
