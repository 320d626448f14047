"""Many tokens with their experts on a GPU: the two products of a gated MLP in tiles of rows of one expert each.

The tokens were sorted by expert (`moe_sorting.py`). The weight is the left operand of the tensor cores and the tile's
rows the right one, so that tiles of 16 rows and of 128 are the same kernel. With float8 weights x comes quantized, and
what is between the projections is quantized on the way, with a scale for each 128 features. Called by `moe_layer.py`;
the second kernel is also the product with a block-scaled weight of `ops.block_fp8`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.fp8 import QuantizedRows
from tokenmill.ops.moe import ExpertMatrix, ExpertWeights, Routing
from tokenmill.ops.moe_plan import SCALE_GROUP, GroupedPlan, grouped_plan
from tokenmill.ops.platform import num_multiprocessors
from tokenmill.ops.triton.activation import activated
from tokenmill.ops.triton.fp8 import FP8_MAX, INVERSE_FP8_MAX, MIN_SCALE
from tokenmill.ops.triton.launch import can_overlap, is_interpreted
from tokenmill.ops.triton.moe_scales import (
    BLOCK_SCALES,
    FEATURE_SCALES,
    GROUP,
    NO_SCALES,
    block_scales,
    load_block,
    scale_kind_of,
)
from tokenmill.ops.triton.moe_sorting import RowBlocks
from tokenmill.ops.triton.prefetch import prefetch_and_pause

EARLY_PAUSE = tl.constexpr(1000)
"""Nanoseconds between pieces: without a pause the kernels ahead, which are short and read little, wait for memory."""


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
        total = tl.dot(weights, values, total, input_precision="ieee")
    else:
        part = tl.dot(weights, values, input_precision="ieee") * row_factors[None, :]
        if factors is not None:
            part *= factors[:, None]
        total += part
    return total


@triton.jit
def _first_scale(
    expert: tl.tensor, out_features: tl.tensor, in_features: tl.tensor, scale_kind: tl.constexpr
) -> tl.tensor:
    """Where the scales of an expert's weights begin among those of all."""
    if scale_kind == BLOCK_SCALES:
        first = expert * ((out_features + GROUP - 1) // GROUP) * ((in_features + GROUP - 1) // GROUP)
    else:
        first = expert * out_features
    return first


@triton.jit
def _gate_up_sums(
    values: tl.tensor,  # [block_in, block_rows], where the rows begin
    is_row: tl.tensor,
    x_scale: tl.tensor,  # [block_rows], where the rows' scales begin
    weight: tl.tensor,  # the expert's
    weight_scale: tl.tensor,
    inside: tl.tensor,  # [GROUP] features
    columns: tl.tensor,  # [block_in]
    in_features: tl.tensor,
    size: tl.tensor,
    num_stages: tl.constexpr,
    scale_kind: tl.constexpr,
    is_even: tl.constexpr,
    is_interpreted: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Sums [GROUP, block_rows] of gate and of up over all input features, scaled."""
    gate_weights = weight + inside.to(tl.int64)[:, None] * in_features + columns[None, :]
    up_weights = gate_weights + size.to(tl.int64) * in_features
    gate = tl.zeros([GROUP, values.shape[1]], tl.float32)
    up = tl.zeros([GROUP, values.shape[1]], tl.float32)
    if scale_kind == FEATURE_SCALES:  # asked for now, used behind the loop
        of_rows = tl.load(x_scale)
        of_gate = tl.load(weight_scale + inside)
        of_up = tl.load(weight_scale + size + inside)
    for start in tl.range(0, in_features, columns.shape[0], num_stages=num_stages):
        is_column = columns < in_features - start
        v = tl.load(values + start, mask=is_column[:, None] & is_row[None, :], other=0.0)
        g = load_block(gate_weights + start, is_column[None, :], is_even)
        u = load_block(up_weights + start, is_column[None, :], is_even)
        if scale_kind == BLOCK_SCALES:
            of_group = tl.load(x_scale + start // GROUP)
            gate = _product(
                gate, g, v, block_scales(weight_scale, inside, start, in_features), of_group, is_interpreted
            )
            up = _product(
                up, u, v, block_scales(weight_scale, size + inside, start, in_features), of_group, is_interpreted
            )
        else:
            gate = _product(gate, g, v, None, None, is_interpreted)
            up = _product(up, u, v, None, None, is_interpreted)
    if scale_kind == FEATURE_SCALES:
        gate *= of_gate[:, None] * of_rows[None, :]
        up *= of_up[:, None] * of_rows[None, :]
    return gate, up


@triton.jit
def _store_inner(
    inner: tl.tensor,  # [GROUP, block_rows]
    rows: tl.tensor,
    is_row: tl.tensor,
    features: tl.tensor,
    size: tl.tensor,
    out: tl.tensor,
    out_scale: tl.tensor,
) -> None:
    """Store a group of features of some rows; quantized with a scale for each row if there is a place for scales."""
    mask = (features < size)[:, None] & is_row[None, :]
    offsets = rows.to(tl.int64)[None, :] * size + features[:, None]
    if out_scale is None:
        tl.store(out + offsets, inner.to(out.dtype.element_ty), mask=mask)
    else:
        inner = tl.where((features < size)[:, None], inner, 0.0)
        scales = tl.maximum(tl.max(tl.abs(inner), axis=0) * INVERSE_FP8_MAX, MIN_SCALE)
        scaled = inner * tl.div_rn(1.0, scales)[None, :]
        tl.store(out + offsets, tl.clamp(scaled, -FP8_MAX, FP8_MAX).to(tl.float8e4nv), mask=mask)
        places = rows.to(tl.int64) * ((size + GROUP - 1) // GROUP) + tl.program_id(0)
        tl.store(out_scale + places, scales, mask=is_row)


@triton.jit
def _gate_up_tile(
    x: tl.tensor,
    x_scale: tl.tensor,
    weight: tl.tensor,  # the expert's
    weight_scale: tl.tensor,
    pairs: tl.tensor,  # the tile's
    out: tl.tensor,
    out_scale: tl.tensor,
    num_pairs: tl.tensor,
    in_features: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    top_k: tl.constexpr,
    block_rows: tl.constexpr,
    block_in: tl.constexpr,
    num_stages: tl.constexpr,
    scale_kind: tl.constexpr,
    is_silu: tl.constexpr,
    is_even: tl.constexpr,
    is_interpreted: tl.constexpr,
) -> None:
    """The first `block_rows` rows of a tile."""
    rows = tl.load(pairs + tl.arange(0, block_rows))
    is_row = rows < num_pairs
    tokens = tl.where(is_row, rows // top_k, 0).to(tl.int64)
    features = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    columns = tl.arange(0, block_in)
    scales_in = (in_features + GROUP - 1) // GROUP
    if scale_kind != NO_SCALES:
        x_scale += tokens * scales_in if scale_kind == BLOCK_SCALES else tokens
    gate, up = _gate_up_sums(
        x + tokens[None, :] * x_stride + columns[:, None], is_row, x_scale, weight, weight_scale,
        tl.minimum(features, size - 1), columns, in_features, size, num_stages, scale_kind, is_even, is_interpreted,
    )  # fmt: skip
    _store_inner(activated(gate, is_silu) * up, rows, is_row, features, size, out, out_scale)


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
    early_programs: int,
    early_piece: int,
    top_k: tl.constexpr,
    block_rows: tl.constexpr,
    halves: tl.constexpr,
    early_pieces: tl.constexpr,
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
        # The experts are not known yet, but those of the first tiles are the first ones, whatever the routing.
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if program < early_programs:
            early = (
                weight.to(tl.pointer_type(tl.uint8), bitcast=True) + program.to(tl.int64) * early_pieces * early_piece
            )
            for piece in tl.static_range(early_pieces):
                prefetch_and_pause(early + piece * early_piece, early_piece, EARLY_PAUSE)
        gdc_wait()
    expert = tl.load(tile_experts + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    pairs += tl.program_id(1) * block_rows
    weight += expert * 2 * size * in_features
    if scale_kind != NO_SCALES:
        weight_scale += _first_scale(expert, 2 * size, in_features, scale_kind)
    is_half = False
    if halves:
        is_half = tl.load(pairs + block_rows // 2) >= num_pairs
    if is_half:
        _gate_up_tile(
            x, x_scale, weight, weight_scale, pairs, out, out_scale, num_pairs, in_features, size, x_stride, top_k,
            block_rows // 2, block_in, num_stages, scale_kind, is_silu, is_even, is_interpreted,
        )  # fmt: skip
    else:
        _gate_up_tile(
            x, x_scale, weight, weight_scale, pairs, out, out_scale, num_pairs, in_features, size, x_stride, top_k,
            block_rows, block_in, num_stages, scale_kind, is_silu, is_even, is_interpreted,
        )  # fmt: skip


@triton.jit
def _sums_of_rows(
    values: tl.tensor,  # [block_in, block_rows], where the rows begin
    is_row: tl.tensor,
    x_scale: tl.tensor,  # [block_rows], where the rows' scales begin
    weight: tl.tensor,
    weight_scale: tl.tensor,
    inside: tl.tensor,  # [block_out] features
    columns: tl.tensor,  # [block_in]
    in_features: tl.tensor,
    num_stages: tl.constexpr,
    scale_kind: tl.constexpr,
    scales_rows: tl.constexpr,
    is_even: tl.constexpr,
    is_interpreted: tl.constexpr,
) -> tl.tensor:
    """Sums [block_out, block_rows] over all input features, scaled."""
    weights = weight + inside.to(tl.int64)[:, None] * in_features + columns[None, :]
    total = tl.zeros([inside.shape[0], values.shape[1]], tl.float32)
    if scale_kind == FEATURE_SCALES:  # asked for now, used behind the loop
        of_features = tl.load(weight_scale + inside)
        if scales_rows:
            of_rows = tl.load(x_scale)
    for start in tl.range(0, in_features, columns.shape[0], num_stages=num_stages):
        is_column = columns < in_features - start
        v = tl.load(values + start, mask=is_column[:, None] & is_row[None, :], other=0.0)
        w = load_block(weights + start, is_column[None, :], is_even)
        if scale_kind == NO_SCALES or scales_rows:
            total = _product(total, w, v, None, None, is_interpreted)
        else:
            of_block = None
            if scale_kind == BLOCK_SCALES:
                of_block = block_scales(weight_scale, inside, start, in_features)
            total = _product(total, w, v, of_block, tl.load(x_scale + start // GROUP), is_interpreted)
    if scale_kind == FEATURE_SCALES:
        total *= of_features[:, None]
        if scales_rows:
            total *= of_rows[None, :]
    return total


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
    """Output features of one tile of rows: pairs of one expert, times their shares, or any rows of the only matrix."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    features = tl.program_id(0) * block_out + tl.arange(0, block_out)
    inside = tl.minimum(features, out_features - 1)
    rows = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    if pairs is not None:
        expert = tl.load(tile_experts + tl.program_id(1)).to(tl.int64)
        if expert < 0:
            return
        rows = tl.load(pairs + rows)
        weight += expert * out_features * in_features
        if scale_kind != NO_SCALES:
            weight_scale += _first_scale(expert, out_features, in_features, scale_kind)
    is_row = rows < num_rows
    sources = tl.where(is_row, rows, 0).to(tl.int64)
    columns = tl.arange(0, block_in)
    if x_scale is not None:
        x_scale += sources if scales_rows else sources * ((in_features + GROUP - 1) // GROUP)
    total = _sums_of_rows(
        x + sources[None, :] * x_stride + columns[:, None], is_row, x_scale, weight, weight_scale, inside, columns,
        in_features, num_stages, scale_kind, scales_rows, is_even, is_interpreted,
    )  # fmt: skip
    if shares is not None:
        total *= tl.load(shares + sources)[None, :]
    if bias is not None:
        total += tl.load(bias + inside).to(tl.float32)[:, None]
    mask = (features < out_features)[:, None] & is_row[None, :]
    offsets = rows.to(tl.int64)[None, :] * out_features + features[:, None]
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)


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
        routing, weights, blocks, plan: see `moe_layer.tile_products`.
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
    num_programs = num_multiprocessors(x.device)  # one fills a multiprocessor, nearly
    early_piece = plan.early_piece(weights.gate_up.values.nbytes, num_pairs / weights.num_experts, num_programs)
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
        num_programs if early_piece else 0,
        early_piece,
        top_k=routing.experts.shape[1],
        block_rows=blocks.block_rows,
        halves=plan.halves,
        early_pieces=plan.early_pieces,
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
    # With scales of groups every product is kept apart from the sum before it is added: twice the registers.
    block_out = plan.down_out if scales is None or scales.dim() == 1 else min(plan.down_out, SCALE_GROUP)
    overlaps = can_overlap(values.device)
    _rows_kernel[(triton.cdiv(out_features, block_out), num_tiles)](
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
        block_out=block_out,
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
