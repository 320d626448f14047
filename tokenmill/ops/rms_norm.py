"""Root-mean-square normalization (https://arxiv.org/abs/1910.07467), alone and fused with the residual addition
before it and the quantization after it.

Computed in float32 inside, whatever the type of the input. Called by `layers.norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch.nn import functional

from tokenmill.ops import captured
from tokenmill.ops.fp8 import QuantizedRows, per_token_quantize_fp8

AddRmsNorm: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
RmsNorm: TypeAlias = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    Args:
        x: [..., D].
        weight: [D], of x's type or float32.
        eps: added to the mean square.

    Returns:
        [..., D], of x's type.
    """
    if x.is_meta:
        return captured.rms_norm(x, weight, eps)
    return IMPLEMENTATIONS[choose(x.device, x.dtype)](x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` to the residual stream, then normalize it: (`rms_norm(residual + x)`, `residual + x`), all [..., D]."""
    if x.is_meta:
        residual = residual + x
        return captured.rms_norm(residual, weight, eps), residual
    return ADD_IMPLEMENTATIONS[choose(x.device, x.dtype)](x, residual, weight, eps)


def rms_norm_fp8(x: torch.Tensor, weight: torch.Tensor, eps: float) -> QuantizedRows:
    """`per_token_quantize_fp8(rms_norm(x, weight, eps))` of x [T, D], in one pass where there is a kernel for it."""
    if choose(x.device, x.dtype) == "triton":
        from tokenmill.ops.triton import rms_norm as kernels

        return QuantizedRows(*kernels.rms_norm_fp8(x, weight, eps))
    return per_token_quantize_fp8(rms_norm(x, weight, eps))


def add_rms_norm_fp8(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[QuantizedRows, torch.Tensor]:
    """`add_rms_norm` of [T, D] with its first result quantized, in one pass where there is a kernel for it."""
    if choose(x.device, x.dtype) == "triton":
        from tokenmill.ops.triton import rms_norm as kernels

        values, scales, total = kernels.add_rms_norm_fp8(x, residual, weight, eps)
        return QuantizedRows(values, scales), total
    normalized, total = add_rms_norm(x, residual, weight, eps)
    return per_token_quantize_fp8(normalized), total


def rms_norm_both(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, QuantizedRows]:
    """`rms_norm` of x [T, D], as it is and quantized."""
    if choose(x.device, x.dtype) == "triton":
        from tokenmill.ops.triton import rms_norm as kernels

        normalized, values, scales = kernels.rms_norm_both(x, weight, eps)
        return normalized, QuantizedRows(values, scales)
    normalized = rms_norm(x, weight, eps)
    return normalized, per_token_quantize_fp8(normalized)


def add_rms_norm_both(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, QuantizedRows, torch.Tensor]:
    """`add_rms_norm` of [T, D], with its first result quantized as well, behind it."""
    if choose(x.device, x.dtype) == "triton":
        from tokenmill.ops.triton import rms_norm as kernels

        normalized, values, scales, total = kernels.add_rms_norm_both(x, residual, weight, eps)
        return normalized, QuantizedRows(values, scales), total
    normalized, total = add_rms_norm(x, residual, weight, eps)
    return normalized, per_token_quantize_fp8(normalized), total


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition of `rms_norm`, step by step in float32."""
    x_float = x.float()
    mean_square = x_float.square().mean(dim=-1, keepdim=True)
    return (x_float * torch.rsqrt(mean_square + eps) * weight.float()).to(x.dtype)


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's own op; a float32 weight with a narrower input is multiplied in float32."""
    if weight.dtype == x.dtype:
        return functional.rms_norm(x, weight.shape, weight, eps)
    return functional.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """One pass over x."""
    from tokenmill.ops.triton import rms_norm as kernels

    return kernels.rms_norm(x, weight, eps)


def add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and norm one after the other."""
    residual = residual + x
    return rms_norm_torch(residual, weight, eps), residual


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `add_rms_norm`: the norm sees the sum as it is rounded to the stream's type."""
    residual = residual + x
    return rms_norm_reference(residual, weight, eps), residual


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over x and the residual."""
    from tokenmill.ops.triton import rms_norm as kernels

    return kernels.add_rms_norm(x, residual, weight, eps)


IMPLEMENTATIONS: Mapping[str, RmsNorm] = MappingProxyType(
    {"reference": rms_norm_reference, "torch": rms_norm_torch, "triton": rms_norm_triton}
)
ADD_IMPLEMENTATIONS: Mapping[str, AddRmsNorm] = MappingProxyType(
    {"reference": add_rms_norm_reference, "torch": add_rms_norm_torch, "triton": add_rms_norm_triton}
)


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation for tensors of this device and type."""
    return "triton" if device.type == "cuda" else "torch"
