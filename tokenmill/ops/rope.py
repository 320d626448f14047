"""Rotary position embedding (https://arxiv.org/abs/2104.09864) in the layout of Hugging Face checkpoints.

Dimension i of a head turns together with dimension i + D/2. `layers.rope.RotaryEmbedding` calls `rotation` once a
step; the attention layers of `models/` call `apply_rope` on query and key heads together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch

from tokenmill.ops import captured

Rope: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FindRotation: TypeAlias = Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


def rotation(positions: torch.Tensor, frequencies: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines of the angles of positions, as `apply_rope` takes them.

    Args:
        positions: [T] int64.
        frequencies: [D / 2] float32, radians per position.
        factor: on both (YaRN's attention factor).

    Returns:
        cos and signed_sin, [T, 1, D] float32.
    """
    return ROTATION_IMPLEMENTATIONS[choose(positions.device, frequencies.dtype)](positions, frequencies, factor)


def rotation_torch(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition."""
    angles = positions[:, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotation_triton(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch."""
    from tokenmill.ops.triton import rope as kernels

    return kernels.rotation(positions, frequencies, factor)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Turn every head of every token by its position's angles.

    Args:
        x: [T, heads, D].
        cos: [T, 1, D] float32; both halves of D are equal.
        signed_sin: [T, 1, D] float32; the first half of D is `-sin`, the second `+sin`.

    Returns:
        [T, heads, D], of x's type, contiguous; computed in float32.
    """
    if x.is_meta:
        return captured.apply_rope(x, cos, signed_sin)
    return IMPLEMENTATIONS[choose(x.device, x.dtype)](x, cos, signed_sin)


def apply_rope_reference(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """The definition of `apply_rope`: each pair (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin)."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half].float(), x[..., half:].float()
    cos, sin = cos[..., :half], signed_sin[..., half:]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def apply_rope_torch(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Few, fat tensor operations: `x * cos + swap_halves(x) * signed_sin`."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, signed_sin).to(x.dtype)


def apply_rope_triton(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """One pass over x, which may be a slice of heads."""
    from tokenmill.ops.triton import rope as kernels

    return kernels.apply_rope(x, cos, signed_sin)


IMPLEMENTATIONS: Mapping[str, Rope] = MappingProxyType(
    {"reference": apply_rope_reference, "torch": apply_rope_torch, "triton": apply_rope_triton}
)

ROTATION_IMPLEMENTATIONS: Mapping[str, FindRotation] = MappingProxyType(
    {"torch": rotation_torch, "triton": rotation_triton}
)


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation for tensors of this device and type."""
    return "triton" if device.type == "cuda" else "torch"
