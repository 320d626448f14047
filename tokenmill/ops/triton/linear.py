"""Products of a few rows with a weight, as fast as the weight can be read: decode steps spend their time here.

`matvec` (one row) keeps every partial product in its own register and adds them up once, at the end. `small_batch` (up
to 64 rows) gives the weight to the tensor cores as the left operand, whose side is never shorter than 64, and pads the
rows to the narrow right side. Where the output is too narrow to occupy the device, the input features are split
over several programs; the last of them to arrive adds up all parts in a fixed order, so results do not change from run
to run. Weights are bfloat16, float16, or float8_e4m3fn with a scale for each output feature. Called by `ops.linear` and
`ops.fp8`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.linear_plan import StreamPlan
from tokenmill.ops.triton.launch import can_overlap, is_interpreted

MIN_BLOCK_ROWS = 16
"""The tensor core kernel pads its rows to a power of two from here on."""
VECTOR = 8
"""Consecutive input features of a thread in `matvec`: 16 bytes of x."""
PREFETCHED_LINES = 8
"""Cache lines of each output feature that `small_batch` asks for while the kernel before it still runs."""


@triton.jit
def _load_weights(weights: tl.tensor, columns: tl.tensor, in_features: tl.tensor, is_inside: tl.constexpr) -> tl.tensor:
    """A block of weights; zeros past the last column. Nothing else will read them: they need not stay in the cache."""
    if is_inside:
        return tl.load(weights, eviction_policy="evict_first")
    return tl.load(weights, mask=(columns < in_features)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_row(x: tl.tensor, columns: tl.tensor, size: tl.tensor, is_inside: tl.constexpr) -> tl.tensor:
    if is_inside:
        return tl.load(x + columns).to(tl.float32)
    return tl.load(x + columns, mask=columns < size, other=0.0).to(tl.float32)


@triton.jit
def _matvec_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    out_features: int,
    in_features: int,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    vector: tl.constexpr,
    looks_ahead: tl.constexpr,
    is_even_in: tl.constexpr,
    has_scale: tl.constexpr,
    has_bias: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: `block_out` output features, over all input features. A block is loaded before the last is used."""
    if overlaps:
        gdc_launch_dependents()
    features = tl.program_id(0) * block_out + tl.arange(0, block_out)
    is_feature = features < out_features
    # A thread's share of x must lie in its registers as its share of the weight does: `vector` values in a row.
    columns = tl.max_contiguous(tl.arange(0, block_in), vector)
    # Rows past the end read the last row again: no mask on the loads that matter.
    rows = tl.minimum(features, out_features - 1).to(tl.int64) * in_features
    weights = weight + rows[:, None] + columns[None, :]
    w = _load_weights(weights, columns, in_features, is_even_in)
    if overlaps:
        gdc_wait()  # weights are there already; x is not before this
    if looks_ahead:
        total = tl.zeros([block_out, block_in], tl.float32)
        for start in range(0, in_features, block_in):
            if is_even_in:
                next_w = tl.load(
                    weights + start + block_in, mask=start + block_in < in_features, eviction_policy="evict_first"
                )
            else:
                next_w = _load_weights(weights + start + block_in, start + block_in + columns, in_features, is_even_in)
            total += w.to(tl.float32) * _load_row(x + start, columns, in_features - start, is_even_in)[None, :]
            w = next_w
    else:
        total = w.to(tl.float32) * _load_row(x, columns, in_features, is_even_in)[None, :]
        for start in range(block_in, in_features, block_in):
            w = _load_weights(weights + start, start + columns, in_features, is_even_in)
            total += w.to(tl.float32) * _load_row(x + start, columns, in_features - start, is_even_in)[None, :]
    result = tl.sum(total, axis=1)
    if has_scale:
        result *= tl.load(weight_scale + features, mask=is_feature, other=0.0)
    if has_bias:
        result += tl.load(bias + features, mask=is_feature, other=0.0).to(tl.float32)
    tl.store(out + features, result.to(out.dtype.element_ty), mask=is_feature)


@triton.jit
def _bfloat16_of_fp8(values: tl.tensor) -> tl.tensor:
    """Four values a time, by way of float16 and float32: the compiler's own conversion goes one by one and is slow."""
    return tl.inline_asm_elementwise(
        asm="""
        {
            .reg .b16 pair<2>, half<4>;
            .reg .b32 halves<2>;
            .reg .f32 single<4>;
            mov.b32 {pair0, pair1}, $2;
            cvt.rn.f16x2.e4m3x2 halves0, pair0;
            cvt.rn.f16x2.e4m3x2 halves1, pair1;
            mov.b32 {half0, half1}, halves0;
            mov.b32 {half2, half3}, halves1;
            cvt.f32.f16 single0, half0;
            cvt.f32.f16 single1, half1;
            cvt.f32.f16 single2, half2;
            cvt.f32.f16 single3, half3;
            cvt.rn.bf16x2.f32 $0, single1, single0;
            cvt.rn.bf16x2.f32 $1, single3, single2;
        }
        """,
        constraints="=r,=r,r",
        args=[values],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _prefetch(addresses: tl.tensor) -> None:
    """Ask for the cache lines at the addresses to come to L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["num_rows", "num_splits", "blocks_per_split"])
def _small_batch_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    partials: tl.tensor,
    arrivals: tl.tensor,
    num_rows: int,
    out_features: int,
    in_features: int,
    x_stride: int,
    num_splits: int,
    blocks_per_split: int,
    block_rows: tl.constexpr,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    num_stages: tl.constexpr,
    is_split: tl.constexpr,
    is_even_in: tl.constexpr,
    unpacks_fp8: tl.constexpr,
    interpreted: tl.constexpr,
    has_scale: tl.constexpr,
    has_x_scale: tl.constexpr,
    has_bias: tl.constexpr,
    overlaps: tl.constexpr,
    prefetched_lines: tl.constexpr,
) -> None:
    """One program: `block_out` output features of all rows, over one split of the input features."""
    if overlaps:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    split = tl.program_id(1)
    features = tile * block_out + tl.arange(0, block_out)
    is_feature = features < out_features
    rows = tl.arange(0, block_rows)
    is_row = rows < num_rows
    columns = tl.arange(0, block_in)
    weights = weight + tl.minimum(features, out_features - 1).to(tl.int64)[:, None] * in_features + columns[None, :]
    values = x + tl.minimum(rows, num_rows - 1)[None, :] * x_stride + columns[:, None]
    first = split * blocks_per_split * block_in
    last = tl.minimum(first + blocks_per_split * block_in, in_features)
    if overlaps:
        line = 128 // (weight.dtype.element_ty.primitive_bitwidth // 8)
        lines = tl.minimum(first + tl.arange(0, prefetched_lines) * line, in_features - 1)
        starts = tl.minimum(features, out_features - 1).to(tl.int64) * in_features
        _prefetch(weight + starts[:, None] + lines[None, :])
        gdc_wait()  # weights are on their way; x is not there before this
    total = tl.zeros([block_out, block_rows], tl.float32)
    for start in tl.range(first, last, block_in, num_stages=num_stages):
        if is_even_in:
            w = tl.load(weights + start, eviction_policy="evict_first")
            v = tl.load(values + start)
        else:
            is_column = start + columns < in_features
            w = tl.load(weights + start, mask=is_column[None, :], other=0.0, eviction_policy="evict_first")
            v = tl.load(values + start, mask=is_column[:, None], other=0.0)
        if unpacks_fp8:
            w = _bfloat16_of_fp8(w)
        elif interpreted:
            w = w.to(tl.float32)  # triton's interpreter multiplies the bits of bfloat16 as integers
            v = v.to(tl.float32)
        total = tl.dot(w, v, total)
    offsets = rows[None, :] * out_features + features[:, None]
    mask = is_feature[:, None] & is_row[None, :]
    if is_split:
        part_size = num_rows * out_features
        tl.store(partials + split * part_size + offsets, total, mask=mask)
        tl.debug_barrier()  # all threads' stores come before the one thread's arrival
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel") != num_splits - 1:
            return
        tl.debug_barrier()
        total = tl.zeros([block_out, block_rows], tl.float32)
        for part in range(num_splits):
            total += tl.load(partials + part * part_size + offsets, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(arrivals + tile, 0)  # ready for the next launch
    if has_scale:
        total *= tl.load(weight_scale + features, mask=is_feature, other=0.0)[:, None]
    if has_x_scale:
        total *= tl.load(x_scale + rows, mask=is_row, other=0.0)[None, :]
    if has_bias:
        total += tl.load(bias + features, mask=is_feature, other=0.0).to(tl.float32)[:, None]
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)


def streamed_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    arrivals: torch.Tensor,
    plan: StreamPlan,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`x @ weight.T * weight_scale + bias`.

    Args:
        x: [T, I], 1 <= T <= 64, bfloat16 or float16.
        weight: [O, I] contiguous, of x's type or float8_e4m3fn.
        weight_scale: [O] float32; None: ones.
        bias: [O].
        arrivals: int32 zeros, one for each block of output features if the plan splits; zeros again afterwards. Products
            that may run at the same time must not share it.
        plan: kernel and block sizes.

    Returns:
        [T, O], of x's type.
    """
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    assert weight.is_contiguous() and x.stride(-1) == 1, "weights and rows must be contiguous"
    out = torch.empty(num_rows, out_features, dtype=dtype, device=x.device)
    num_tiles = triton.cdiv(out_features, plan.block_out)
    is_even_in = in_features % plan.block_in == 0
    overlaps = can_overlap(x.device)
    if plan.kernel == "matvec":
        _matvec_kernel[(num_tiles,)](
            x,
            weight,
            weight_scale,
            bias,
            out,
            out_features,
            in_features,
            block_out=plan.block_out,
            block_in=plan.block_in,
            vector=VECTOR,
            looks_ahead=plan.num_stages > 1,
            is_even_in=is_even_in,
            has_scale=weight_scale is not None,
            has_bias=bias is not None,
            overlaps=overlaps,
            num_warps=plan.num_warps,
            launch_pdl=overlaps,
        )
        return out
    assert arrivals.numel() >= num_tiles or plan.num_splits == 1, "too few arrival counters"
    partials = None
    if plan.num_splits > 1:
        partials = torch.empty(plan.num_splits, num_rows, out_features, dtype=torch.float32, device=x.device)
    _small_batch_kernel[(num_tiles, plan.num_splits)](
        x,
        x_scale,
        weight,
        weight_scale,
        bias,
        out,
        partials,
        arrivals,
        num_rows,
        out_features,
        in_features,
        x.stride(0),
        plan.num_splits,
        triton.cdiv(triton.cdiv(in_features, plan.block_in), plan.num_splits),
        block_rows=max(MIN_BLOCK_ROWS, triton.next_power_of_2(num_rows)),
        block_out=plan.block_out,
        block_in=plan.block_in,
        num_stages=plan.num_stages,
        is_split=plan.num_splits > 1,
        is_even_in=is_even_in,
        unpacks_fp8=weight.dtype == torch.float8_e4m3fn and x.dtype == torch.bfloat16 and not is_interpreted(),
        interpreted=is_interpreted(),
        has_scale=weight_scale is not None,
        has_x_scale=x_scale is not None,
        has_bias=bias is not None,
        overlaps=overlaps,
        prefetched_lines=PREFETCHED_LINES,
        num_warps=plan.num_warps,
        launch_pdl=overlaps,
    )
    return out
