"""Norm of every query and key head, then the rotary embedding (Qwen 3, Gemma 3): `rms_norm` and `apply_rope` as one op.

Called by the attention layers of `models/` through `layers.rope`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch

from tokenmill.ops.rms_norm import rms_norm, rms_norm_reference
from tokenmill.ops.rope import apply_rope, apply_rope_reference


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Factors of the norms of query and key heads, [D] each, of the heads' type or float32; `eps` of both."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


HeadNormRope: TypeAlias = Callable[
    [torch.Tensor, int, HeadNorm, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]


def norm_and_rope(
    heads: torch.Tensor, num_query_heads: int, norm: HeadNorm, cos: torch.Tensor, signed_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize and turn the heads of each token.

    Args:
        heads: [T, H + G, D], query heads first; may be a slice of the merged projection.
        num_query_heads: H.
        norm: of the heads.
        cos, signed_sin: see `ops.rope.apply_rope`.

    Returns:
        Query [T, H, D] and key [T, G, D], of the heads' type, to which the norm's result is rounded as well.
    """
    return IMPLEMENTATIONS[choose(heads.device, heads.dtype)](heads, num_query_heads, norm, cos, signed_sin)


def norm_and_rope_torch(
    heads: torch.Tensor, num_query_heads: int, norm: HeadNorm, cos: torch.Tensor, signed_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two ops, for queries and keys."""
    query, key = heads[:, :num_query_heads], heads[:, num_query_heads:]
    query = apply_rope(rms_norm(query, norm.query, norm.eps), cos, signed_sin)
    return query, apply_rope(rms_norm(key, norm.key, norm.eps), cos, signed_sin)


def norm_and_rope_reference(
    heads: torch.Tensor, num_query_heads: int, norm: HeadNorm, cos: torch.Tensor, signed_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definitions of the two ops."""
    query, key = heads[:, :num_query_heads], heads[:, num_query_heads:]
    query = apply_rope_reference(rms_norm_reference(query, norm.query, norm.eps), cos, signed_sin)
    return query, apply_rope_reference(rms_norm_reference(key, norm.key, norm.eps), cos, signed_sin)


def norm_and_rope_triton(
    heads: torch.Tensor, num_query_heads: int, norm: HeadNorm, cos: torch.Tensor, signed_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch for all heads."""
    from tokenmill.ops.triton import head_norm as kernels

    out = kernels.norm_and_rope(heads, num_query_heads, norm.query, norm.key, norm.eps, cos, signed_sin)
    return out[:, :num_query_heads], out[:, num_query_heads:]


IMPLEMENTATIONS: Mapping[str, HeadNormRope] = MappingProxyType(
    {"reference": norm_and_rope_reference, "torch": norm_and_rope_torch, "triton": norm_and_rope_triton}
)


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation for tensors of this device and type."""
    return "triton" if device.type == "cuda" else "torch"
