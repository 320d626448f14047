"""Products of a few rows with a weight, as fast as the weight can be read: decode steps spend their time here.

`small_batch` gives the weight to the tensor cores as the left operand, whose side is never shorter than 64, and pads
the rows to the narrow right side. Where the output is too narrow to occupy the device, the input features are split
over several programs; the last of them to arrive adds up all parts in a fixed order, so results do not change from run
to run. One row is the matter of `matvec.py` and `row_product.py`. Called by `ops.linear` and `ops.fp8`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.linear_plan import StreamPlan
from tokenmill.ops.triton.launch import can_overlap, is_interpreted

PREFETCHED_LINES = tl.constexpr(4)
"""Cache lines of each output feature that `small_batch` asks for while the kernel before it still runs."""


@triton.jit
def load_weights(addresses: tl.tensor, columns: tl.tensor, size: tl.tensor, is_inside: tl.constexpr) -> tl.tensor:
    """A block of weights, zeros from column `size` on. Nothing else will read them: they need not stay in the cache."""
    if is_inside:
        return tl.load(addresses, eviction_policy="evict_first")
    return tl.load(addresses, mask=(columns < size)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def scaled(
    total: tl.tensor, features: tl.tensor, is_feature: tl.tensor, weight_scale: tl.tensor, bias: tl.tensor
) -> tl.tensor:
    """Sums [features, rows] times the features' scales, plus their bias; either may be None."""
    if weight_scale is not None:
        total *= tl.load(weight_scale + features, mask=is_feature, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + features, mask=is_feature, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit
def _load_columns(x: tl.tensor, columns: tl.tensor, size: tl.tensor, is_inside: tl.constexpr) -> tl.tensor:
    """A block of several rows of x as columns, zeros from column `size` of x on."""
    if is_inside:
        return tl.load(x)
    return tl.load(x, mask=(columns < size)[:, None], other=0.0)


@triton.jit
def _prefetch(features: tl.tensor, first: tl.tensor, in_features: tl.tensor) -> None:
    """Ask for the cache lines from column `first` of each feature to come to L2."""
    line: tl.constexpr = 128 // (features.dtype.element_ty.primitive_bitwidth // 8)
    columns = tl.minimum(first + tl.arange(0, PREFETCHED_LINES) * line, in_features - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [features[:, None] + columns[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _arrive(
    parts: tl.tensor,
    total: tl.tensor,
    mask: tl.tensor,
    arrivals: tl.tensor,
    split: tl.tensor,
    num_splits: tl.tensor,
    part_size: tl.tensor,
) -> tl.tensor:
    """Leave this program's part for the last one to arrive; whether this is the last one, which finds all parts."""
    tl.store(parts + split * part_size, total, mask=mask)
    tl.debug_barrier()  # all threads' stores come before the one thread's arrival
    is_last = tl.atomic_add(arrivals, 1, sem="acq_rel") == num_splits - 1
    tl.debug_barrier()
    if is_last:
        tl.store(arrivals, 0)  # ready for the next launch
    return is_last


@triton.jit
def _sum_of_parts(parts: tl.tensor, mask: tl.tensor, num_splits: tl.tensor, part_size: tl.tensor) -> tl.tensor:
    """All parts, in the order of the splits."""
    total = tl.load(parts, mask=mask, other=0.0, cache_modifier=".cg")
    for part in range(1, num_splits):
        total += tl.load(parts + part * part_size, mask=mask, other=0.0, cache_modifier=".cg")
    return total


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
    is_even: tl.constexpr,
    is_interpreted: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: a block of features of a block of rows, over one split of the input features."""
    if overlaps:
        gdc_launch_dependents()
    tile, split = tl.program_id(1), tl.program_id(2)
    features = tile * block_out + tl.arange(0, block_out)
    is_feature = features < out_features
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    is_row = rows < num_rows
    columns = tl.arange(0, block_in)
    starts = tl.minimum(features, out_features - 1).to(tl.int64) * in_features
    weights = weight + starts[:, None] + columns[None, :]
    values = x + (rows % num_rows).to(tl.int64)[None, :] * x_stride + columns[:, None]  # not all one row: a hot spot
    first = split * blocks_per_split * block_in
    last = tl.minimum(first + blocks_per_split * block_in, in_features)
    if overlaps:
        _prefetch(weight + starts, first, in_features)
        gdc_wait()  # x is there only now; the first weights have been on their way before
    total = tl.zeros([block_out, block_rows], tl.float32)
    for start in tl.range(first, last, block_in, num_stages=num_stages):
        w = load_weights(weights + start, columns, in_features - start, is_even)
        v = _load_columns(values + start, columns, in_features - start, is_even)
        if is_interpreted:  # the interpreter would multiply the bits of bfloat16 as integers
            w, v = w.to(tl.float32), v.to(tl.float32)
        total = tl.dot(w, v, total)
    offsets = rows.to(tl.int64)[None, :] * out_features + features[:, None]
    mask = is_feature[:, None] & is_row[None, :]
    if partials is not None:
        parts = partials + offsets
        counter = arrivals + tile * tl.num_programs(0) + tl.program_id(0)
        if not _arrive(parts, total, mask, counter, split, num_splits, num_rows * out_features):
            return
        total = _sum_of_parts(parts, mask, num_splits, num_rows * out_features)
    if x_scale is not None:
        total *= tl.load(x_scale + rows, mask=is_row, other=0.0)[None, :]
    total = scaled(total, features, is_feature, weight_scale, bias)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)


def small_batch(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    arrivals: torch.Tensor,
    plan: StreamPlan,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`(x * x_scale) @ (weight * weight_scale).T + bias` of some rows.

    Args:
        x: [T, I], T > 0.
        x_scale: [T] float32; None: ones.
        weight: [O, I] contiguous, of x's type.
        weight_scale: [O] float32; None: ones.
        bias: [O].
        arrivals: int32 zeros, one for each block of the result; zeros again afterwards. Not for two products at the
            same time.
        plan: block sizes and splits.
        dtype: of the result.

    Returns:
        [T, O].
    """
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    num_tiles, num_row_blocks = triton.cdiv(out_features, plan.block_out), triton.cdiv(num_rows, plan.block_rows)
    assert x.stride(1) == 1 and weight.is_contiguous() and weight.dtype == x.dtype
    assert arrivals.numel() >= num_tiles * num_row_blocks, "too few arrival counters"
    out = torch.empty(num_rows, out_features, dtype=dtype, device=x.device)
    partials = None if plan.num_splits == 1 else out.new_empty(plan.num_splits, *out.shape, dtype=torch.float32)
    overlaps = can_overlap(x.device)
    _small_batch_kernel[(num_row_blocks, num_tiles, plan.num_splits)](
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
        block_rows=plan.block_rows,
        block_out=plan.block_out,
        block_in=plan.block_in,
        num_stages=plan.num_stages,
        is_even=in_features % plan.block_in == 0,
        is_interpreted=is_interpreted(),
        overlaps=overlaps,
        num_warps=plan.num_warps,
        launch_pdl=overlaps,
    )
    return out
