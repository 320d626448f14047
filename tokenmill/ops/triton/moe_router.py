"""A router's product and the choice of experts in one launch, for steps of some hundred tokens.

The weight is small: each program holds some of its columns before the kernel ahead of it has ended. The last program to
arrive for a block of tokens adds up all parts in a fixed order and chooses. Called by `ops.moe`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.moe_plan import ROUTER_BLOCK_IN, ROUTER_BLOCK_ROWS, ROUTER_WARPS
from tokenmill.ops.triton.launch import can_overlap, is_interpreted
from tokenmill.ops.triton.linear import arrive


@triton.jit
def _store_choice(
    logits: tl.tensor,  # [rows, experts] float32
    rows: tl.tensor,
    is_row: tl.tensor,
    num_experts: tl.tensor,
    experts_out: tl.tensor,
    shares_out: tl.tensor,
    top_k: tl.constexpr,
    normalize: tl.constexpr,
    block_experts: tl.constexpr,
) -> None:
    """Softmax, the `top_k` most likely experts of each row by falling probability, and their shares."""
    experts = tl.arange(0, block_experts)[None, :]
    inside = experts < num_experts
    logits = tl.where(inside, logits, float("-inf"))
    shares = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    shares = shares / tl.sum(shares, axis=1)[:, None]
    # Bits of numbers from 0 on are in the numbers' order, and the largest of integers is one instruction of a warp.
    bits = shares.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(inside, bits, -1)
    ranks = tl.full(logits.shape, -1, tl.int32)
    for k in tl.static_range(top_k):
        largest = tl.max(bits, axis=1)[:, None]
        chosen = tl.min(tl.where(bits == largest, experts, block_experts), axis=1)[:, None]
        ranks = tl.where(experts == chosen, k, ranks)
        bits = tl.where(experts == chosen, -1, bits)
    if normalize:
        shares = shares / tl.sum(tl.where(ranks >= 0, shares, 0.0), axis=1)[:, None]
    places = rows[:, None] * top_k + ranks
    is_chosen = (ranks >= 0) & is_row[:, None]
    tl.store(experts_out + places, tl.broadcast_to(experts, ranks.shape), mask=is_chosen)
    tl.store(shares_out + places, shares, mask=is_chosen)


@triton.jit(do_not_specialize=["num_rows"])
def _router_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    parts: tl.tensor,
    arrivals: tl.tensor,
    experts_out: tl.tensor,
    shares_out: tl.tensor,
    num_rows: int,
    num_experts: int,
    size: int,
    x_stride: int,
    top_k: tl.constexpr,
    normalize: tl.constexpr,
    num_splits: tl.constexpr,
    block_rows: tl.constexpr,
    block_experts: tl.constexpr,
    block_in: tl.constexpr,
    is_interpreted: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: `block_rows` tokens and `block_in` input features; the last one for its tokens chooses."""
    if overlaps:
        gdc_launch_dependents()
    split = tl.program_id(1)
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    is_row = rows < num_rows
    experts = tl.arange(0, block_experts)
    columns = split * block_in + tl.arange(0, block_in)
    is_column = columns < size
    is_weight = (experts < num_experts)[None, :] & is_column[:, None]
    w = tl.load(weight + experts[None, :] * size + columns[:, None], mask=is_weight, other=0.0)
    if overlaps:
        gdc_wait()
    first = x + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * x_stride
    v = tl.load(first + columns[None, :], mask=is_column[None, :], other=0.0)
    if is_interpreted:  # the interpreter would multiply the bits of bfloat16 as integers
        w, v = w.to(tl.float32), v.to(tl.float32)
    total = tl.dot(v, w)
    offsets = rows[:, None] * block_experts + experts[None, :]
    every = is_row[:, None] & (experts >= 0)[None, :]
    part_size = num_rows * block_experts
    if not arrive(parts + offsets, total, every, arrivals + tl.program_id(0), split, num_splits, part_size):
        return
    total = tl.load(parts + offsets, mask=every, other=0.0, cache_modifier=".cg")
    for part in tl.static_range(1, num_splits):  # unrolled: all parts are on their way at once
        total += tl.load(parts + offsets + part * part_size, mask=every, other=0.0, cache_modifier=".cg")
    logits = total.to(x.dtype.element_ty).to(tl.float32)  # rounded as a product of its own would be
    _store_choice(logits, rows, is_row, num_experts, experts_out, shares_out, top_k, normalize, block_experts)


def route_rows(
    x: torch.Tensor, weight: torch.Tensor, arrivals: torch.Tensor, top_k: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts [T, K] int32 and their shares [T, K] float32 of rows x [T, H], T > 0, with a router's weight [E, H].

    `arrivals`: int32 zeros, one for each `ROUTER_BLOCK_ROWS` tokens; zeros again afterwards.
    """
    (num_rows, size), num_experts = x.shape, weight.shape[0]
    num_splits, num_row_blocks = triton.cdiv(size, ROUTER_BLOCK_IN), triton.cdiv(num_rows, ROUTER_BLOCK_ROWS)
    assert x.stride(1) == 1 and weight.is_contiguous() and weight.dtype == x.dtype
    assert arrivals.numel() >= num_row_blocks, "too few arrival counters"
    block_experts = max(16, triton.next_power_of_2(num_experts))
    parts = torch.empty(num_splits, num_rows, block_experts, dtype=torch.float32, device=x.device)
    experts = torch.empty(num_rows, top_k, dtype=torch.int32, device=x.device)
    shares = torch.empty(num_rows, top_k, dtype=torch.float32, device=x.device)
    overlaps = can_overlap(x.device)
    _router_kernel[(num_row_blocks, num_splits)](
        x,
        weight,
        parts,
        arrivals,
        experts,
        shares,
        num_rows,
        num_experts,
        size,
        x.stride(0),
        top_k=top_k,
        normalize=normalize,
        num_splits=num_splits,
        block_rows=ROUTER_BLOCK_ROWS,
        block_experts=block_experts,
        block_in=ROUTER_BLOCK_IN,
        is_interpreted=is_interpreted(),
        overlaps=overlaps,
        num_warps=ROUTER_WARPS,
        launch_pdl=overlaps,
    )
    return experts, shares
