"""Root-mean-square normalization (https://arxiv.org/abs/1910.07467), alone and fused with the residual addition.

Computed in float32 inside, whatever the type of the input. Called by `layers.norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch.nn import functional

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
    return IMPLEMENTATIONS[choose(x.device, x.dtype)](x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` to the residual stream, then normalize it: (`rms_norm(residual + x)`, `residual + x`), all [..., D]."""
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


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


IMPLEMENTATIONS: Mapping[str, RmsNorm] = MappingProxyType({"reference": rms_norm_reference, "torch": rms_norm_torch})


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation for tensors of this device and type."""
    return "torch"
