"""A router's product and the choice of experts for some hundred tokens, in two launches that overlap.

The weight is small, and so are its parts: a program holds some columns of it before the kernel ahead has ended, and
leaves its products for the launch that adds them up, in a fixed order, and chooses. Called by `ops.router`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.moe_plan import ROUTER_PLAN
from tokenmill.ops.triton.launch import can_overlap, is_interpreted


@triton.jit(do_not_specialize=["num_rows"])
def _router_product_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    parts: tl.tensor,
    num_rows: int,
    num_experts: int,
    size: int,
    x_stride: int,
    block_rows: tl.constexpr,
    block_experts: tl.constexpr,
    block_in: tl.constexpr,
    is_interpreted: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: `block_rows` tokens and `block_in` input features."""
    if overlaps:
        gdc_launch_dependents()
    split = tl.program_id(1)
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    experts = tl.arange(0, block_experts)
    columns = split * block_in + tl.arange(0, block_in)
    is_column = columns < size
    is_weight = (experts < num_experts)[None, :] & is_column[:, None]
    w = tl.load(weight + experts[None, :] * size + columns[:, None], mask=is_weight, other=0.0)
    if overlaps:
        gdc_wait()  # the weights have been on their way before
    first = x + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * x_stride
    v = tl.load(first + columns[None, :], mask=is_column[None, :], other=0.0)
    if is_interpreted:  # the interpreter would multiply the bits of bfloat16 as integers
        w, v = w.to(tl.float32), v.to(tl.float32)
    places = (split * num_rows + rows)[:, None] * block_experts + experts[None, :]
    tl.store(parts + places, tl.dot(v, w), mask=(rows < num_rows)[:, None] & (experts >= 0)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _choose_experts_kernel(
    parts: tl.tensor,
    experts_out: tl.tensor,
    shares_out: tl.tensor,
    num_rows: int,
    num_experts: int,
    num_splits: tl.constexpr,
    dtype: tl.constexpr,
    top_k: tl.constexpr,
    normalize: tl.constexpr,
    block_rows: tl.constexpr,
    block_experts: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: softmax, the `top_k` most likely experts by falling probability, and shares of `block_rows` tokens.

    A row for each warp.
    """
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)[:, None]
    experts = tl.arange(0, block_experts)[None, :]
    is_row, inside = rows < num_rows, experts < num_experts
    places = parts + rows * block_experts + experts
    total = tl.load(places, mask=is_row & inside, other=0.0)
    for split in tl.static_range(1, num_splits):  # unrolled: all parts are on their way at once
        total += tl.load(places + split * num_rows * block_experts, mask=is_row & inside, other=0.0)
    logits = tl.where(inside, total.to(dtype).to(tl.float32), float("-inf"))  # rounded as a product of its own would be
    shares = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    shares = shares / tl.sum(shares, axis=1)[:, None]
    # Bits of numbers from 0 on are in the numbers' order, and a warp finds the largest integer in one instruction.
    bits = tl.where(inside, shares.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    ranks = tl.full(logits.shape, -1, tl.int32)
    for k in tl.static_range(top_k):
        largest = tl.max(bits, axis=1)[:, None]
        chosen = tl.min(tl.where(bits == largest, experts, block_experts), axis=1)[:, None]
        ranks = tl.where(experts == chosen, k, ranks)
        bits = tl.where(experts == chosen, -1, bits)
    if normalize:
        shares = shares / tl.sum(tl.where(ranks >= 0, shares, 0.0), axis=1)[:, None]
    is_chosen = (ranks >= 0) & is_row
    tl.store(experts_out + rows * top_k + ranks, tl.broadcast_to(experts, ranks.shape), mask=is_chosen)
    tl.store(shares_out + rows * top_k + ranks, shares, mask=is_chosen)


def route_rows(x: torch.Tensor, weight: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts [T, K] int32 and their shares [T, K] float32 of rows x [T, H], T > 0, with a router's weight [E, H]."""
    (num_rows, size), num_experts = x.shape, weight.shape[0]
    assert x.stride(1) == 1 and weight.is_contiguous() and weight.dtype == x.dtype
    plan = ROUTER_PLAN
    num_splits = triton.cdiv(size, plan.block_in)
    block_experts = max(16, triton.next_power_of_2(num_experts))
    parts = torch.empty(num_splits, num_rows, block_experts, dtype=torch.float32, device=x.device)
    experts = torch.empty(num_rows, top_k, dtype=torch.int32, device=x.device)
    shares = torch.empty(num_rows, top_k, dtype=torch.float32, device=x.device)
    overlaps = can_overlap(x.device)
    _router_product_kernel[(triton.cdiv(num_rows, plan.block_rows), num_splits)](
        x,
        weight,
        parts,
        num_rows,
        num_experts,
        size,
        x.stride(0),
        block_rows=plan.block_rows,
        block_experts=block_experts,
        block_in=plan.block_in,
        is_interpreted=is_interpreted(),
        overlaps=overlaps,
        num_warps=plan.num_warps,
        launch_pdl=overlaps,
    )
    _choose_experts_kernel[(triton.cdiv(num_rows, plan.choice_rows),)](
        parts,
        experts,
        shares,
        num_rows,
        num_experts,
        num_splits=num_splits,
        dtype=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
        top_k=top_k,
        normalize=normalize,
        block_rows=plan.choice_rows,
        block_experts=block_experts,
        overlaps=overlaps,
        num_warps=plan.choice_rows,
        launch_pdl=overlaps,
    )
    return experts, shares
