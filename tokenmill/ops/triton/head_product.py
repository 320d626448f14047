"""The product of some hundred float8 rows with the weight of merged heads, each head normalized and turned behind it.

A program computes one head of a block of rows, whose number need not be a power of two: two blocks beside each other
share the weights, so that there are as many programs as multiprocessors. Called by `ops.head_product`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.triton.launch import can_overlap, is_interpreted
from tokenmill.ops.triton.linear import load_weights


@triton.jit
def _prefetch(rows: tl.tensor, num_lines: tl.constexpr, size: tl.tensor) -> None:
    """Ask for the first cache lines of some rows of 8-bit weights to come to L2."""
    columns = tl.minimum(tl.arange(0, num_lines) * 128, size - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [rows[:, None] + columns[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _store_heads(
    x1: tl.tensor,  # [half, rows] float32, first half of the head
    x2: tl.tensor,  # second half
    rows: tl.tensor,
    num_rows: tl.tensor,
    head: tl.tensor,
    num_heads: tl.tensor,
    num_query: tl.tensor,
    num_turned: tl.tensor,
    x_scale: tl.tensor,
    weight_scale: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    cos: tl.tensor,
    signed_sin: tl.tensor,
    out: tl.tensor,
    angle_stride: tl.tensor,
    eps: tl.tensor,
    half: tl.constexpr,
    turns: tl.constexpr,
) -> None:
    is_row = rows < num_rows
    pairs = tl.arange(0, half)
    of_rows = tl.load(x_scale + rows, mask=is_row, other=0.0)[None, :]
    x1 *= tl.load(weight_scale + head * 2 * half + pairs)[:, None] * of_rows
    x2 *= tl.load(weight_scale + head * 2 * half + half + pairs)[:, None] * of_rows
    dtype = out.dtype.element_ty
    mask = (pairs >= 0)[:, None] & is_row[None, :]
    if turns:  # noqa: SIM102  (known when it is compiled)
        if head < num_turned:
            # Rounded as between separate launches.
            x1, x2 = x1.to(dtype).to(tl.float32), x2.to(dtype).to(tl.float32)
            factor = tl.rsqrt((tl.sum(x1 * x1, axis=0) + tl.sum(x2 * x2, axis=0)) / (2 * half) + eps)[None, :]
            is_query = head < num_query
            weight1 = tl.where(is_query, tl.load(query_norm + pairs), tl.load(key_norm + pairs)).to(tl.float32)
            weight2 = tl.where(is_query, tl.load(query_norm + half + pairs), tl.load(key_norm + half + pairs))
            weight2 = weight2.to(tl.float32)
            x1 = (x1 * factor * weight1[:, None]).to(dtype).to(tl.float32)
            x2 = (x2 * factor * weight2[:, None]).to(dtype).to(tl.float32)
            angles = rows[None, :] * angle_stride + pairs[:, None]
            cosines = tl.load(cos + angles, mask=mask, other=0.0)
            sines = tl.load(signed_sin + half + angles, mask=mask, other=0.0)
            turned = x1 * cosines - x2 * sines
            x2 = x2 * cosines + x1 * sines
            x1 = turned
    first = out + (rows.to(tl.int64)[None, :] * num_heads + head) * (2 * half) + pairs[:, None]
    tl.store(first, x1.to(dtype), mask=mask)
    tl.store(first + half, x2.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _head_product_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    cos: tl.tensor,
    signed_sin: tl.tensor,
    out: tl.tensor,
    num_rows: int,
    num_heads: int,
    num_query: int,
    num_turned: int,
    in_features: int,
    x_stride: int,
    angle_stride: int,
    eps: float,
    half: tl.constexpr,
    first_rows: tl.constexpr,
    more_rows: tl.constexpr,
    block_in: tl.constexpr,
    num_stages: tl.constexpr,
    num_lines: tl.constexpr,
    is_even: tl.constexpr,
    turns: tl.constexpr,
    is_interpreted: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: a head of `first_rows` and `more_rows` rows."""
    if overlaps:
        gdc_launch_dependents()
    head = tl.program_id(1)
    rows = tl.program_id(0) * (first_rows + more_rows) + tl.arange(0, first_rows)
    columns = tl.arange(0, block_in)
    starts = weight + (head * 2 * half + tl.arange(0, half)).to(tl.int64) * in_features
    weights = starts[:, None] + columns[None, :]
    to_second = half * in_features
    if overlaps:
        _prefetch(starts, num_lines, in_features)
        _prefetch(starts + to_second, num_lines, in_features)
        gdc_wait()
    values = x + tl.minimum(rows, num_rows - 1).to(tl.int64)[None, :] * x_stride + columns[:, None]
    t1 = tl.zeros([half, first_rows], tl.float32)
    t2 = tl.zeros([half, first_rows], tl.float32)
    if more_rows > 0:
        rows_behind = tl.program_id(0) * (first_rows + more_rows) + first_rows + tl.arange(0, more_rows)
        values_behind = x + tl.minimum(rows_behind, num_rows - 1).to(tl.int64)[None, :] * x_stride + columns[:, None]
        u1 = tl.zeros([half, more_rows], tl.float32)
        u2 = tl.zeros([half, more_rows], tl.float32)
    for start in tl.range(0, in_features, block_in, num_stages=num_stages):
        is_column = columns < in_features - start
        w1 = load_weights(weights + start, columns, in_features - start, is_even)
        w2 = load_weights(weights + to_second + start, columns, in_features - start, is_even)
        v = tl.load(values + start) if is_even else tl.load(values + start, mask=is_column[:, None], other=0.0)
        if is_interpreted:
            w1, w2, v = w1.to(tl.float32), w2.to(tl.float32), v.to(tl.float32)
        t1 = tl.dot(w1, v, t1)
        t2 = tl.dot(w2, v, t2)
        if more_rows > 0:
            if is_even:
                v_behind = tl.load(values_behind + start)
            else:
                v_behind = tl.load(values_behind + start, mask=is_column[:, None], other=0.0)
            if is_interpreted:
                v_behind = v_behind.to(tl.float32)
            u1 = tl.dot(w1, v_behind, u1)
            u2 = tl.dot(w2, v_behind, u2)
    _store_heads(
        t1, t2, rows, num_rows, head, num_heads, num_query, num_turned, x_scale, weight_scale, query_norm, key_norm,
        cos, signed_sin, out, angle_stride, eps, half, turns,
    )  # fmt: skip
    if more_rows > 0:
        _store_heads(
            u1, u2, rows_behind, num_rows, head, num_heads, num_query, num_turned, x_scale, weight_scale, query_norm,
            key_norm, cos, signed_sin, out, angle_stride, eps, half, turns,
        )  # fmt: skip


def head_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    num_heads: int,
    num_query: int,
    num_turned: int,
    query_norm: torch.Tensor,
    key_norm: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    signed_sin: torch.Tensor,
    dtype: torch.dtype,
    plan: tuple[int, int, int, int, int, int],
    turns: bool = True,
) -> torch.Tensor:
    """[T, heads, D]."""
    first_rows, more_rows, block_in, num_stages, num_warps, num_lines = plan
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    head_dim = out_features // num_heads
    out = torch.empty(num_rows, num_heads, head_dim, dtype=dtype, device=x.device)
    overlaps = can_overlap(x.device)
    _head_product_kernel[(triton.cdiv(num_rows, first_rows + more_rows), num_heads)](
        x,
        x_scale,
        weight,
        weight_scale,
        query_norm,
        key_norm,
        cos,
        signed_sin,
        out,
        num_rows,
        num_heads,
        num_query,
        num_turned,
        in_features,
        x.stride(0),
        cos.stride(0),
        eps,
        half=head_dim // 2,
        first_rows=first_rows,
        more_rows=more_rows,
        block_in=block_in,
        num_stages=num_stages,
        num_lines=num_lines,
        is_even=in_features % block_in == 0,
        turns=turns,
        is_interpreted=is_interpreted(),
        overlaps=overlaps,
        num_warps=num_warps,
        launch_pdl=overlaps,
    )
    return out
