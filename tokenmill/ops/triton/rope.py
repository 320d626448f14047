"""Rotary embedding: the angles of a step, and the turning of all heads, one launch each. Called by `ops.rope`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.triton.launch import can_overlap, warps_for

ELEMENTS_PER_PROGRAM = 2048


@triton.jit
def _rotation_kernel(
    positions: tl.tensor,
    frequencies: tl.tensor,
    cos: tl.tensor,
    signed_sin: tl.tensor,
    factor: float,
    half: tl.constexpr,
    block_half: tl.constexpr,
) -> None:
    """One program a token."""
    token = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, block_half)
    is_pair = pairs < half
    angles = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + pairs, mask=is_pair, other=0.0)
    cosines, sines = tl.cos(angles) * factor, tl.sin(angles) * factor
    first = token * (2 * half) + pairs
    tl.store(cos + first, cosines, mask=is_pair)
    tl.store(cos + first + half, cosines, mask=is_pair)
    tl.store(signed_sin + first, -sines, mask=is_pair)
    tl.store(signed_sin + first + half, sines, mask=is_pair)


@triton.jit
def store_turned(
    x1: tl.tensor,  # [heads, pairs] float32, first halves
    x2: tl.tensor,  # second halves
    cos: tl.tensor,
    signed_sin: tl.tensor,
    angle_stride: tl.tensor,
    out: tl.tensor,
    token: tl.tensor,
    heads: tl.tensor,  # [heads]
    num_heads: tl.tensor,
    half: tl.constexpr,
    block_half: tl.constexpr,
) -> None:
    """Turn heads of a token by its angles and store them."""
    pairs = tl.arange(0, block_half)
    is_pair = pairs < half
    mask = (heads < num_heads)[:, None] & is_pair[None, :]
    cosines = tl.load(cos + token * angle_stride + pairs, mask=is_pair, other=0.0)[None, :]
    sines = tl.load(signed_sin + token * angle_stride + half + pairs, mask=is_pair, other=0.0)[None, :]
    first = out + (token * num_heads + heads[:, None]) * (2 * half) + pairs[None, :]
    tl.store(first, (x1 * cosines - x2 * sines).to(out.dtype.element_ty), mask=mask)
    tl.store(first + half, (x2 * cosines + x1 * sines).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(
    x: tl.tensor,
    cos: tl.tensor,
    signed_sin: tl.tensor,
    out: tl.tensor,
    num_heads: int,
    token_stride: int,
    head_stride: int,
    angle_stride: int,
    half: tl.constexpr,
    block_heads: tl.constexpr,
    block_half: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: `block_heads` heads of one token."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * block_heads + tl.arange(0, block_heads)
    pairs = tl.arange(0, block_half)
    mask = (heads < num_heads)[:, None] & (pairs < half)[None, :]
    first = x + token * token_stride + heads[:, None] * head_stride + pairs[None, :]
    x1 = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(first + half, mask=mask, other=0.0).to(tl.float32)
    store_turned(x1, x2, cos, signed_sin, angle_stride, out, token, heads, num_heads, half, block_half)


def rotation(positions: torch.Tensor, frequencies: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed_sin [T, 1, D] float32 of positions [T]; see `ops.rope.rotation`."""
    num_tokens, half = positions.shape[0], frequencies.shape[0]
    cos, signed_sin = (
        torch.empty(num_tokens, 1, 2 * half, dtype=torch.float32, device=positions.device) for _ in range(2)
    )
    if num_tokens:
        assert positions.is_contiguous() and frequencies.is_contiguous()
        block_half = triton.next_power_of_2(half)
        _rotation_kernel[(num_tokens,)](
            positions, frequencies, cos, signed_sin, factor, half=half, block_half=block_half, num_warps=1
        )
    return cos, signed_sin


def apply_rope(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] turned, contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    grid, options = head_launch(x, cos, signed_sin, ELEMENTS_PER_PROGRAM)
    _rope_kernel[grid](
        x,
        cos,
        signed_sin,
        out,
        x.shape[1],
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        **options,
    )
    return out


def head_launch(
    x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, elements: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of a kernel whose programs take a token's heads of x [T, heads, D], some `elements` each."""
    assert x.stride(-1) == 1 and cos.stride(-1) == 1, "heads and angles must be contiguous along the head dimension"
    assert cos.stride(0) == signed_sin.stride(0), "cosines and sines must be laid out alike"
    num_tokens, num_heads, head_dim = x.shape
    block_half = triton.next_power_of_2(head_dim // 2)
    block_heads = min(triton.next_power_of_2(num_heads), max(1, elements // (2 * block_half)))
    overlaps = can_overlap(x.device)
    return (num_tokens, triton.cdiv(num_heads, block_heads)), {
        "half": head_dim // 2,
        "block_heads": block_heads,
        "block_half": block_half,
        "overlaps": overlaps,
        "num_warps": warps_for(2 * block_heads * block_half),
        "launch_pdl": overlaps,
    }
