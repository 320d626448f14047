"""Many tokens with their experts on a GPU: the two products of a gated MLP in tiles of rows of one expert each.

The tokens were sorted by expert (`moe_routing.py`). The weight is the left operand of the tensor cores and the tile's
rows the right one, so that tiles of 16 rows and of 128 are the same kernel. With float8 weights x comes quantized, and
what is between the projections is quantized on the way, with a scale for each 128 features. Called by `ops.moe`; the
second kernel is also the product with a block-scaled weight of `ops.block_fp8`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.fp8 import QuantizedRows, per_token_quantize_fp8
from tokenmill.ops.moe import ExpertMatrix, ExpertWeights, Routing
from tokenmill.ops.moe_plan import SCALE_GROUP, GroupedPlan, grouped_plan
from tokenmill.ops.triton.activation import activated
from tokenmill.ops.triton.fp8 import FP8_MAX, INVERSE_FP8_MAX, MIN_SCALE
from tokenmill.ops.triton.launch import can_overlap, is_interpreted
from tokenmill.ops.triton.moe_routing import RowBlocks, combine, sort_pairs
from tokenmill.ops.triton.moe_scales import (
    BLOCK_SCALES,
    FEATURE_SCALES,
    GROUP,
    NO_SCALES,
    block_scales,
    feature_scales,
    load_block,
    quantize_groups,
    scale_kind_of,
)


@triton.jit
def _product(
    total: tl.tensor,
    weights: tl.tensor,
    values: tl.tensor,
    factors: tl.tensor,
    row_factors: tl.tensor,
    is_interpreted: tl.constexpr,
) -> tl.tensor:
    """`total` plus the product of two blocks; factors of features and rows, or None."""
    if is_interpreted:  # the interpreter would multiply the bits of bfloat16 as integers
        weights, values = weights.to(tl.float32), values.to(tl.float32)
    if row_factors is None:
        total = tl.dot(weights, values, total)
    else:
        part = tl.dot(weights, values) * row_factors[None, :]
        if factors is not None:
            part *= factors[:, None]
        total += part
    return total


@triton.jit(do_not_specialize=["num_pairs"])
def _gate_up_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    pairs: tl.tensor,
    tile_experts: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
    num_pairs: int,
    in_features: int,
    size: int,
    x_stride: int,
    top_k: tl.constexpr,
    block_rows: tl.constexpr,
    block_in: tl.constexpr,
    num_stages: tl.constexpr,
    scale_kind: tl.constexpr,
    is_silu: tl.constexpr,
    is_even: tl.constexpr,
    is_interpreted: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """128 features of gate and of up for one tile of rows, activated and multiplied; quantized if x is."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.load(tile_experts + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    rows = tl.load(pairs + tl.program_id(1) * block_rows + tl.arange(0, block_rows))
    is_row = rows < num_pairs
    tokens = tl.where(is_row, rows // top_k, 0).to(tl.int64)
    features = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    inside = tl.minimum(features, size - 1)
    columns = tl.arange(0, block_in)
    gate_weights = weight + (expert * 2 * size + inside)[:, None] * in_features + columns[None, :]
    up_weights = weight + ((expert * 2 + 1) * size + inside)[:, None] * in_features + columns[None, :]
    values = x + tokens[None, :] * x_stride + columns[:, None]
    scales_in = (in_features + GROUP - 1) // GROUP
    if scale_kind == BLOCK_SCALES:
        weight_scale += expert * (2 * size // GROUP) * scales_in
    gate = tl.zeros([GROUP, block_rows], tl.float32)
    up = tl.zeros([GROUP, block_rows], tl.float32)
    for start in tl.range(0, in_features, block_in, num_stages=num_stages):
        is_column = columns < in_features - start
        v = load_block(values + start, is_column[:, None], is_even)
        g = load_block(gate_weights + start, is_column[None, :], is_even)
        u = load_block(up_weights + start, is_column[None, :], is_even)
        if scale_kind == BLOCK_SCALES:
            of_rows = tl.load(x_scale + tokens * scales_in + start // GROUP)
            of_gate = block_scales(weight_scale, inside, start, in_features)
            of_up = block_scales(weight_scale, size + inside, start, in_features)
            gate = _product(gate, g, v, of_gate, of_rows, is_interpreted)
            up = _product(up, u, v, of_up, of_rows, is_interpreted)
        else:
            gate = _product(gate, g, v, None, None, is_interpreted)
            up = _product(up, u, v, None, None, is_interpreted)
    if scale_kind == FEATURE_SCALES:
        of_rows = tl.load(x_scale + tokens)
        weight_scale += expert * 2 * size
        gate *= feature_scales(weight_scale, features, size)[:, None] * of_rows[None, :]
        up *= feature_scales(weight_scale + size, features, size)[:, None] * of_rows[None, :]
    inner = tl.where((features < size)[:, None], activated(gate, is_silu) * up, 0.0)
    mask = (features < size)[:, None] & is_row[None, :]
    offsets = rows.to(tl.int64)[None, :] * size + features[:, None]
    if out_scale is None:
        tl.store(out + offsets, inner.to(out.dtype.element_ty), mask=mask)
    else:
        scales = tl.maximum(tl.max(tl.abs(inner), axis=0) * INVERSE_FP8_MAX, MIN_SCALE)
        scaled = inner * tl.div_rn(1.0, scales)[None, :]
        tl.store(out + offsets, tl.clamp(scaled, -FP8_MAX, FP8_MAX).to(tl.float8e4nv), mask=mask)
        places = rows.to(tl.int64) * ((size + GROUP - 1) // GROUP) + tl.program_id(0)
        tl.store(out_scale + places, scales, mask=is_row)


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    pairs: tl.tensor,
    tile_experts: tl.tensor,
    shares: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_rows: int,
    in_features: int,
    out_features: int,
    x_stride: int,
    block_rows: tl.constexpr,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    num_stages: tl.constexpr,
    scale_kind: tl.constexpr,
    scales_rows: tl.constexpr,
    is_even: tl.constexpr,
    is_interpreted: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """Output features of one tile of rows; rows of float8 have one scale each, or one for every 128 input features.

    The rows are pairs, in tiles of one expert each, and weighted with their shares; or all rows in order (`pairs` is
    None) of the only matrix.
    """
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    rows = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    if pairs is not None:
        expert = tl.load(tile_experts + tl.program_id(1)).to(tl.int64)
        if expert < 0:
            return
        rows = tl.load(pairs + rows)
        weight += expert * out_features * in_features
        if scale_kind == FEATURE_SCALES:
            weight_scale += expert * out_features
        if scale_kind == BLOCK_SCALES:
            weight_scale += expert * ((out_features + GROUP - 1) // GROUP) * ((in_features + GROUP - 1) // GROUP)
    is_row = rows < num_rows
    sources = tl.where(is_row, rows, 0).to(tl.int64)
    features = tl.program_id(0) * block_out + tl.arange(0, block_out)
    inside = tl.minimum(features, out_features - 1)
    columns = tl.arange(0, block_in)
    weights = weight + inside.to(tl.int64)[:, None] * in_features + columns[None, :]
    values = x + sources[None, :] * x_stride + columns[:, None]
    scales_in = (in_features + GROUP - 1) // GROUP
    total = tl.zeros([block_out, block_rows], tl.float32)
    for start in tl.range(0, in_features, block_in, num_stages=num_stages):
        is_column = columns < in_features - start
        v = load_block(values + start, is_column[:, None], is_even)
        w = load_block(weights + start, is_column[None, :], is_even)
        if scale_kind == NO_SCALES or scales_rows:
            total = _product(total, w, v, None, None, is_interpreted)
        else:
            of_rows = tl.load(x_scale + sources * scales_in + start // GROUP)
            of_features = None
            if scale_kind == BLOCK_SCALES:
                of_features = block_scales(weight_scale, inside, start, in_features)
            total = _product(total, w, v, of_features, of_rows, is_interpreted)
    if scale_kind == FEATURE_SCALES:
        total *= feature_scales(weight_scale, features, out_features)[:, None]
        if scales_rows:
            total *= tl.load(x_scale + sources)[None, :]
    if shares is not None:
        total *= tl.load(shares + sources)[None, :]
    if bias is not None:
        total += tl.load(bias + inside).to(tl.float32)[:, None]
    mask = (features < out_features)[:, None] & is_row[None, :]
    tl.store(
        out + rows.to(tl.int64)[None, :] * out_features + features[:, None], total.to(out.dtype.element_ty), mask=mask
    )


def run_tiles(x: torch.Tensor, routing: Routing, weights: ExpertWeights, plan: GroupedPlan) -> torch.Tensor:
    """[T, H]: quantize if the weights are float8, sort, multiply, multiply, add up."""
    blocks = sort_pairs(routing.experts, weights.first_expert, weights.num_experts, plan.block_rows)
    by_token = weights.scales_inner_by_token(routing.experts.numel())
    unquantized = x.dtype if by_token else None
    inner = grouped_gate_up(*_operand(x, weights.gate_up), routing, weights, blocks, plan, unquantized=unquantized)
    if isinstance(inner, torch.Tensor) and by_token:
        inner = per_token_quantize_fp8(inner)
    of_pairs = grouped_down(inner, routing, weights, blocks, plan, x.dtype)
    return combine(of_pairs, routing.experts, weights.first_expert, weights.num_experts)


def grouped_gate_up(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    routing: Routing,
    weights: ExpertWeights,
    blocks: RowBlocks,
    plan: GroupedPlan,
    *,
    unquantized: torch.dtype | None = None,
) -> torch.Tensor | QuantizedRows:
    """What is between the projections, for every pair: [T * K, I], quantized by groups of 128 if x is float8.

    Args:
        x: [T, H], of the weights' type.
        x_scales: for float8: [T] float32, or [T, ceil(H / 128)] if the weights are block-scaled.
        routing, weights, blocks, plan: see `run_tiles`.
        unquantized: leave it in this type.
    """
    num_pairs, (hidden, size) = routing.experts.numel(), weights.down.values.shape[1:]
    num_groups = triton.cdiv(size, SCALE_GROUP)
    out = torch.empty(num_pairs, size, dtype=unquantized or x.dtype, device=x.device)
    out_scales = None
    if x_scales is not None and unquantized is None:
        out_scales = torch.empty(num_pairs, num_groups, dtype=torch.float32, device=x.device)
    block_in = plan.gate_up_bytes // x.element_size()
    if weights.gate_up.is_block_scaled:
        block_in = min(block_in, SCALE_GROUP)  # one factor for each stage
    overlaps = can_overlap(x.device)
    _gate_up_kernel[(num_groups, blocks.experts.shape[0])](  # programs with the same rows run together
        x,
        x_scales,
        *weights.gate_up,
        blocks.pairs,
        blocks.experts,
        out,
        out_scales,
        num_pairs,
        hidden,
        size,
        x.stride(0),
        top_k=routing.experts.shape[1],
        block_rows=blocks.block_rows,
        block_in=block_in,
        num_stages=plan.gate_up_stages,
        scale_kind=scale_kind_of(weights.gate_up),
        is_silu=weights.activation == "silu",
        is_even=hidden % block_in == 0,
        is_interpreted=is_interpreted(),
        overlaps=overlaps,
        num_warps=plan.gate_up_warps,
        launch_pdl=overlaps,
    )
    return out if out_scales is None else QuantizedRows(out, out_scales)


def grouped_down(
    inner: torch.Tensor | QuantizedRows,
    routing: Routing,
    weights: ExpertWeights,
    blocks: RowBlocks,
    plan: GroupedPlan,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Every pair's output times its share, [T * K, H] of type `dtype`."""
    values, scales = inner if isinstance(inner, QuantizedRows) else (inner, None)
    out = torch.empty(values.shape[0], weights.down.values.shape[1], dtype=dtype, device=values.device)
    _launch_rows(values, scales, weights.down, blocks, routing.weights, None, out, plan)
    return out


def block_scaled_product(
    x: QuantizedRows,
    weight: ExpertMatrix,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    plan: GroupedPlan | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias` of one matrix with a scale for each block, x with one for each row and 128 features."""
    out = torch.empty(x.values.shape[0], weight.values.shape[1], dtype=dtype, device=x.values.device)
    if out.numel():
        _launch_rows(x.values, x.scales, weight, None, None, bias, out, plan or grouped_plan(x.values.shape[0], 1))
    return out


def _launch_rows(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    matrix: ExpertMatrix,
    blocks: RowBlocks | None,
    shares: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    plan: GroupedPlan,
) -> None:
    num_rows, in_features = values.shape
    out_features = out.shape[1]
    block_rows = plan.block_rows
    num_tiles = triton.cdiv(num_rows, block_rows) if blocks is None else blocks.experts.shape[0]
    block_in = SCALE_GROUP // values.element_size()
    overlaps = can_overlap(values.device)
    _rows_kernel[(triton.cdiv(out_features, plan.down_out), num_tiles)](
        values,
        scales,
        *matrix,
        None if blocks is None else blocks.pairs,
        None if blocks is None else blocks.experts,
        shares,
        bias,
        out,
        num_rows,
        in_features,
        out_features,
        values.stride(0),
        block_rows=block_rows,
        block_out=plan.down_out,
        block_in=block_in,
        num_stages=plan.down_stages,
        scale_kind=scale_kind_of(matrix),
        scales_rows=scales is not None and scales.dim() == 1,
        is_even=in_features % block_in == 0,
        is_interpreted=is_interpreted(),
        overlaps=overlaps,
        num_warps=plan.down_warps,
        launch_pdl=overlaps,
    )


def _operand(x: torch.Tensor, matrix: ExpertMatrix) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x as the product with `matrix` takes it, and its scales."""
    if matrix.scales is None:
        return x, None
    return quantize_groups(x) if matrix.is_block_scaled else per_token_quantize_fp8(x)
