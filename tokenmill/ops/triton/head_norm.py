"""Norm and rotary embedding of all query and key heads in one launch. Called by `ops.head_norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.triton.rope import head_launch, store_turned

ELEMENTS_PER_PROGRAM = 1024


@triton.jit
def _norm_and_rope_kernel(
    x: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    cos: tl.tensor,
    signed_sin: tl.tensor,
    out: tl.tensor,
    num_heads: int,
    num_query_heads: int,
    token_stride: int,
    head_stride: int,
    angle_stride: int,
    eps: float,
    half: tl.constexpr,
    block_heads: tl.constexpr,
    block_half: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: `block_heads` heads of one token."""
    if overlaps:
        gdc_launch_dependents()
    heads = tl.program_id(1) * block_heads + tl.arange(0, block_heads)
    pairs = tl.arange(0, block_half)
    is_pair = pairs < half
    is_query = (heads < num_query_heads)[:, None] & is_pair[None, :]
    is_key = (heads >= num_query_heads)[:, None] & is_pair[None, :]
    across = tl.zeros([block_heads], tl.int32)[:, None] + pairs[None, :]
    weight1 = tl.load(query_weight + across, mask=is_query, other=0.0).to(tl.float32)
    weight1 += tl.load(key_weight + across, mask=is_key, other=0.0).to(tl.float32)
    weight2 = tl.load(query_weight + half + across, mask=is_query, other=0.0).to(tl.float32)
    weight2 += tl.load(key_weight + half + across, mask=is_key, other=0.0).to(tl.float32)
    if overlaps:
        gdc_wait()  # the weights have been on their way before
    token = tl.program_id(0).to(tl.int64)
    mask = (heads < num_heads)[:, None] & is_pair[None, :]
    first = x + token * token_stride + heads[:, None] * head_stride + pairs[None, :]
    x1 = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(first + half, mask=mask, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * half) + eps)[:, None]
    # Rounded as between two ops, so that the fused and the separate way agree.
    x1 = (x1 * factor * weight1).to(out.dtype.element_ty).to(tl.float32)
    x2 = (x2 * factor * weight2).to(out.dtype.element_ty).to(tl.float32)
    store_turned(x1, x2, cos, signed_sin, angle_stride, out, token, heads, num_heads, half, block_half)


def norm_and_rope(
    x: torch.Tensor,
    num_query_heads: int,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    signed_sin: torch.Tensor,
) -> torch.Tensor:
    """x [T, heads, D] normalized and turned, contiguous; the first heads are those of the query."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    grid, options = head_launch(x, cos, signed_sin, ELEMENTS_PER_PROGRAM)
    _norm_and_rope_kernel[grid](
        x,
        query_weight,
        key_weight,
        cos,
        signed_sin,
        out,
        x.shape[1],
        num_query_heads,
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        eps,
        **options,
    )
    return out
