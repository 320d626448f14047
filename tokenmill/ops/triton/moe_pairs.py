"""Few tokens with their experts on a GPU, as fast as the weights of just those experts can be read.

Two launches: a program computes some features between the projections of one token and expert, then some output
features of one token, for which it adds up the products of all the token's experts. Tokens are taken as they are,
whatever the type of the weights. Called by `ops.moe`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.moe import ExpertMatrix, ExpertWeights, Routing
from tokenmill.ops.moe_plan import PairPlan
from tokenmill.ops.triton.activation import activated
from tokenmill.ops.triton.launch import can_overlap
from tokenmill.ops.triton.moe_scales import BLOCK_SCALES, FEATURE_SCALES, GROUP, load_block, scale_kind_of


@triton.jit
def _weights_in_float(
    weights: tl.tensor,
    scales: tl.tensor,
    features: tl.tensor,
    columns: tl.tensor,
    in_features: tl.tensor,
    is_even: tl.constexpr,
    scale_kind: tl.constexpr,
) -> tl.tensor:
    """A block of one expert's weights; scaled if the scales are those of blocks."""
    addresses = weights + features.to(tl.int64)[:, None] * in_features + columns[None, :]
    values = load_block(addresses, (columns < in_features)[None, :], is_even).to(tl.float32)
    if scale_kind == BLOCK_SCALES:
        blocks_in = (in_features + GROUP - 1) // GROUP
        blocks = (features // GROUP)[:, None] * blocks_in + tl.minimum(columns // GROUP, blocks_in - 1)[None, :]
        values *= tl.load(scales + blocks)
    return values


@triton.jit
def _prefetch(rows: tl.tensor, size: tl.tensor, num_lines: tl.constexpr) -> None:
    """Ask for the cache lines of some rows of weights to come to L2."""
    line: tl.constexpr = 128 // (rows.dtype.element_ty.primitive_bitwidth // 8)
    columns = tl.minimum(tl.arange(0, num_lines) * line, size - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [rows[:, None] + columns[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["first_expert"])
def _pair_gate_up_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    experts: tl.tensor,
    out: tl.tensor,
    first_expert: int,
    num_experts: int,
    in_features: int,
    size: int,
    x_stride: int,
    top_k: tl.constexpr,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    scale_kind: tl.constexpr,
    is_silu: tl.constexpr,
    is_even: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """`block_out` features of gate and of up for one token and expert, activated and multiplied."""
    if overlaps:  # in this order, so that the next kernel may read the routing before it waits
        gdc_wait()
        gdc_launch_dependents()
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(experts + pair).to(tl.int64) - first_expert
    if (expert < 0) | (expert >= num_experts):
        return
    features = tl.program_id(0) * block_out + tl.arange(0, block_out)
    inside = tl.minimum(features, size - 1)
    columns = tl.max_contiguous(tl.arange(0, block_in), 8)
    weight += expert * 2 * size * in_features
    if scale_kind == BLOCK_SCALES:
        weight_scale += expert * (2 * size // GROUP) * ((in_features + GROUP - 1) // GROUP)
    gate = tl.zeros([block_out, block_in], tl.float32)
    up = tl.zeros([block_out, block_in], tl.float32)
    for start in range(0, in_features, block_in):
        current = start + columns
        g = _weights_in_float(weight, weight_scale, inside, current, in_features, is_even, scale_kind)
        u = _weights_in_float(weight, weight_scale, size + inside, current, in_features, is_even, scale_kind)
        v = load_block(x + (pair // top_k) * x_stride + current, current < in_features, is_even).to(tl.float32)
        gate += g * v[None, :]
        up += u * v[None, :]
    gate_sum, up_sum = tl.sum(gate, axis=1), tl.sum(up, axis=1)
    if scale_kind == FEATURE_SCALES:
        weight_scale += expert * 2 * size
        gate_sum *= tl.load(weight_scale + inside)
        up_sum *= tl.load(weight_scale + size + inside)
    inner = activated(gate_sum, is_silu) * up_sum
    tl.store(out + pair * size + features, inner.to(out.dtype.element_ty), mask=features < size)


@triton.jit(do_not_specialize=["first_expert"])
def _pair_down_kernel(
    inner: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    experts: tl.tensor,
    shares: tl.tensor,
    out: tl.tensor,
    first_expert: int,
    num_experts: int,
    in_features: int,
    out_features: int,
    top_k: tl.constexpr,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    num_blocks_in: tl.constexpr,
    prefetched_lines: tl.constexpr,
    scale_kind: tl.constexpr,
    is_even: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """`block_out` output features of one token: its experts' products, weighted and added up."""
    token = tl.program_id(1).to(tl.int64)
    features = tl.program_id(0) * block_out + tl.arange(0, block_out)
    inside = tl.minimum(features, out_features - 1)
    if overlaps:
        gdc_launch_dependents()
        for k in tl.static_range(top_k):
            expert = tl.load(experts + token * top_k + k).to(tl.int64) - first_expert
            if (expert >= 0) & (expert < num_experts):
                _prefetch(weight + (expert * out_features + inside) * in_features, in_features, prefetched_lines)
        gdc_wait()
    columns = tl.max_contiguous(tl.arange(0, block_in), 8)
    blocks_per_expert = ((out_features + GROUP - 1) // GROUP) * ((in_features + GROUP - 1) // GROUP)
    total = tl.zeros([block_out, block_in], tl.float32)
    for k in tl.static_range(top_k):
        pair = token * top_k + k
        expert = tl.load(experts + pair).to(tl.int64) - first_expert
        is_here = (expert >= 0) & (expert < num_experts)
        expert = tl.where(is_here, expert, 0)
        share = tl.where(is_here, tl.load(shares + pair), 0.0)
        factors = tl.full([block_out], 1.0, tl.float32) * share
        scales = weight_scale
        if scale_kind == FEATURE_SCALES:
            factors *= tl.load(weight_scale + expert * out_features + inside)
        if scale_kind == BLOCK_SCALES:
            scales = weight_scale + expert * blocks_per_expert
        for block in tl.static_range(num_blocks_in):
            current = block * block_in + columns
            w = _weights_in_float(
                weight + expert * out_features * in_features, scales, inside, current, in_features, is_even, scale_kind
            )
            # What belongs to an expert elsewhere was not written.
            is_column = (current < in_features) & (share + tl.zeros([block_in], tl.float32) > 0.0)
            v = tl.load(inner + pair * in_features + current, mask=is_column, other=0.0).to(tl.float32)
            total += w * v[None, :] * factors[:, None]
    tl.store(
        out + token * out_features + features,
        tl.sum(total, axis=1).to(out.dtype.element_ty),
        mask=features < out_features,
    )


def run_pairs(
    x: torch.Tensor, routing: Routing, weights: ExpertWeights, gate_up_plan: PairPlan, down_plan: PairPlan
) -> torch.Tensor:
    """[T, H]: matrix-vector products for each token and expert; x is taken as it is."""
    (num_tokens, hidden), top_k = x.shape, routing.experts.shape[1]
    size = weights.down.values.shape[2]
    inner = torch.empty(num_tokens * top_k, size, dtype=x.dtype, device=x.device)
    overlaps = can_overlap(x.device)
    plan = gate_up_plan
    _pair_gate_up_kernel[(triton.cdiv(size, plan.block_out), num_tokens * top_k)](
        x,
        *weights.gate_up,
        routing.experts,
        inner,
        weights.first_expert,
        weights.num_experts,
        hidden,
        size,
        x.stride(0),
        top_k=top_k,
        block_out=plan.block_out,
        block_in=plan.block_in,
        scale_kind=scale_kind_of(weights.gate_up),
        is_silu=weights.activation == "silu",
        is_even=hidden % plan.block_in == 0,
        overlaps=overlaps,
        num_warps=plan.num_warps,
        launch_pdl=overlaps,
    )
    return project_pairs(inner, weights.down, routing.experts, routing.weights, weights.first_expert, down_plan)


def project_pairs(
    inner: torch.Tensor,
    matrix: ExpertMatrix,
    experts: torch.Tensor,
    shares: torch.Tensor,
    first_expert: int,
    plan: PairPlan,
) -> torch.Tensor:
    """[T, O]: sums over the experts [T, K] of each token, which take the rows [T * K, I] and count by their shares."""
    (num_tokens, top_k), (num_experts, out_features, in_features) = experts.shape, matrix.values.shape
    out = torch.empty(num_tokens, out_features, dtype=inner.dtype, device=inner.device)
    overlaps = can_overlap(inner.device)
    _pair_down_kernel[(triton.cdiv(out_features, plan.block_out), num_tokens)](
        inner,
        *matrix,
        experts,
        shares,
        out,
        first_expert,
        num_experts,
        in_features,
        out_features,
        top_k=top_k,
        block_out=plan.block_out,
        block_in=plan.block_in,
        num_blocks_in=triton.cdiv(in_features, plan.block_in),
        prefetched_lines=triton.next_power_of_2(triton.cdiv(in_features * matrix.values.element_size(), 128)),
        scale_kind=scale_kind_of(matrix),
        is_even=in_features % plan.block_in == 0,
        overlaps=overlaps,
        num_warps=plan.num_warps,
        launch_pdl=overlaps,
    )
    return out
