"""Products whose rows do not depend on how many there are: for engines that give the same tokens whatever the batch.

Every number of the result is summed over the input features in one order: those of a split one after the other in the
tensor cores, then the splits. Tiles grow with the number of rows, which changes who computes a number but not how; few
rows have a program for each split, and many rows have all splits in one program, added up in the same order. Called by
`ops.linear` and `ops.fp8`; the plans are `ops.linear_plan.invariant_plan`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tokenmill.ops.linear_plan import InvariantPlan
from tokenmill.ops.triton.launch import is_interpreted


@triton.jit
def _split_sum(
    values: tl.tensor,  # [block_in, block_rows] addresses in x
    weights: tl.tensor,  # [block_out, block_in] addresses
    first: tl.tensor,
    last: tl.tensor,
    in_features: int,
    block_out: tl.constexpr,
    block_rows: tl.constexpr,
    block_in: tl.constexpr,
    num_stages: tl.constexpr,
    is_even: tl.constexpr,
    is_interpreted: tl.constexpr,
) -> tl.tensor:
    """[block_out, block_rows] sums over the input features from `first` to `last`."""
    columns = tl.arange(0, block_in)
    total = tl.zeros([block_out, block_rows], tl.float32)
    for start in tl.range(first, last, block_in, num_stages=num_stages):
        if is_even:
            w, v = tl.load(weights + start), tl.load(values + start)
        else:
            is_column = columns < in_features - start
            w = tl.load(weights + start, mask=is_column[None, :], other=0.0)
            v = tl.load(values + start, mask=is_column[:, None], other=0.0)
        if is_interpreted:  # the interpreter would multiply the bits of bfloat16 as integers
            w, v = w.to(tl.float32), v.to(tl.float32)
        total = tl.dot(w, v, total)
    return total


@triton.jit(do_not_specialize=["num_rows", "num_splits"])  # a split's size says how its loads are aligned
def _product_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    partials: tl.tensor,
    num_rows: int,
    out_features: int,
    in_features: int,
    x_stride: int,
    num_splits: int,
    split_size: int,
    block_rows: tl.constexpr,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    group_rows: tl.constexpr,
    num_stages: tl.constexpr,
    is_split: tl.constexpr,
    is_even: tl.constexpr,
    is_interpreted: tl.constexpr,
) -> None:
    """One program: a tile of the result, over one split with `partials`, else over all of them.

    Neighbouring programs share rows and weights: `group_rows` blocks of rows with the same features, then the next
    features.
    """
    programs_of_group = tl.cdiv(out_features, block_out) * group_rows
    group, inside = tl.program_id(0) // programs_of_group, tl.program_id(0) % programs_of_group
    rows_here = tl.minimum(tl.cdiv(num_rows, block_rows) - group * group_rows, group_rows)
    features = inside // rows_here * block_out + tl.arange(0, block_out)
    rows = (group * group_rows + inside % rows_here) * block_rows + tl.arange(0, block_rows)
    is_feature, is_row = features < out_features, rows < num_rows
    columns = tl.arange(0, block_in)
    starts = tl.minimum(features, out_features - 1).to(tl.int64) * in_features
    weights = weight + starts[:, None] + columns[None, :]
    values = x + (rows % num_rows).to(tl.int64)[None, :] * x_stride + columns[:, None]  # not all one row: a hot spot
    offsets = rows.to(tl.int64)[None, :] * out_features + features[:, None]
    mask = is_feature[:, None] & is_row[None, :]
    if is_split and partials is None:
        total = tl.zeros([block_out, block_rows], tl.float32)
        for split in range(num_splits):
            first = split * split_size
            total += _split_sum(
                values, weights, first, tl.minimum(first + split_size, in_features), in_features, block_out,
                block_rows, block_in, num_stages, is_even, is_interpreted,
            )  # fmt: skip
    else:
        first = tl.program_id(1) * split_size
        total = _split_sum(
            values, weights, first, tl.minimum(first + split_size, in_features), in_features, block_out, block_rows,
            block_in, num_stages, is_even, is_interpreted,
        )  # fmt: skip
    if partials is not None:
        tl.store(partials + tl.program_id(1).to(tl.int64) * num_rows * out_features + offsets, total, mask=mask)
    else:
        _store(total, offsets, mask, features, rows, is_feature, is_row, x_scale, weight_scale, bias, out)


@triton.jit
def _store(
    total: tl.tensor,  # [features, rows]
    offsets: tl.tensor,
    mask: tl.tensor,
    features: tl.tensor,
    rows: tl.tensor,
    is_feature: tl.tensor,
    is_row: tl.tensor,
    x_scale: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
) -> None:
    """Scale, add the bias and store."""
    if x_scale is not None:
        total = total * tl.load(x_scale + rows, mask=is_row, other=0.0)[None, :]
    if weight_scale is not None:
        total = total * tl.load(weight_scale + features, mask=is_feature, other=0.0)[:, None]
    # Rounded first: where the compiler finds a product and a sum side by side, one instruction would round once.
    rounded = total.to(out.dtype.element_ty)
    if bias is not None:
        added = tl.load(bias + features, mask=is_feature, other=0.0).to(tl.float32)[:, None]
        rounded = (rounded.to(tl.float32) + added).to(out.dtype.element_ty)
    tl.store(out + offsets, rounded, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _add_product_splits_kernel(
    partials: tl.tensor,
    x_scale: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_rows: int,
    out_features: int,
    num_splits: int,
    block_out: tl.constexpr,
) -> None:
    """One program: `block_out` features of one row; the splits are added up in their order."""
    row = tl.program_id(1)
    features = tl.program_id(0) * block_out + tl.arange(0, block_out)
    rows = row + tl.arange(0, 1)
    is_feature, is_row = features < out_features, rows < num_rows
    offsets = rows.to(tl.int64)[None, :] * out_features + features[:, None]
    mask = is_feature[:, None] & is_row[None, :]
    total = tl.zeros([block_out, 1], tl.float32)
    for split in range(num_splits):
        part = partials + tl.cast(split, tl.int64) * num_rows * out_features
        total += tl.load(part + offsets, mask=mask, other=0.0)
    _store(total, offsets, mask, features, rows, is_feature, is_row, x_scale, weight_scale, bias, out)


ADDED_FEATURES = 256
"""Output features of a program that adds up splits."""


def invariant_product(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    plan: InvariantPlan,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`(x * x_scale) @ (weight * weight_scale).T + bias`; the bits of a row do not depend on the others.

    Args:
        x: [T, I].
        x_scale: [T] float32; None: ones.
        weight: [O, I] contiguous, of x's type.
        weight_scale: [O] float32; None: ones.
        bias: [O].
        plan: tiles and splits, for T rows.
        dtype: of the result.

    Returns:
        [T, O].
    """
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    assert weight.is_contiguous() and weight.dtype == x.dtype
    out = torch.empty(num_rows, out_features, dtype=dtype, device=x.device)
    if num_rows == 0:
        return out
    partials = out.new_empty(plan.num_splits, *out.shape, dtype=torch.float32) if plan.splits_programs else None
    num_programs = triton.cdiv(out_features, plan.block_out) * triton.cdiv(num_rows, plan.block_rows)
    _product_kernel[(num_programs, 1 if partials is None else plan.num_splits)](
        x, x_scale, weight, weight_scale, bias, out, partials, num_rows, out_features, in_features, x.stride(0),
        plan.num_splits, plan.split_size,
        block_rows=plan.block_rows,
        block_out=plan.block_out,
        block_in=plan.block_in,
        group_rows=plan.group_rows,
        num_stages=plan.num_stages,
        is_split=plan.num_splits > 1,
        is_even=in_features % plan.block_in == 0,
        is_interpreted=is_interpreted(),
        num_warps=plan.num_warps,
    )  # fmt: skip
    if partials is not None:
        _add_product_splits_kernel[(triton.cdiv(out_features, ADDED_FEATURES), num_rows)](
            partials, x_scale, weight_scale, bias, out, num_rows, out_features, plan.num_splits,
            block_out=ADDED_FEATURES,
            num_warps=2,
        )  # fmt: skip
    return out
