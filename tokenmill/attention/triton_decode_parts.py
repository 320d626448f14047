"""The parts that a decode row's context is cut into, and how they are put together. Called by `triton_decode.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.attention.triton_common import Result, store_result


class Partial(NamedTuple):
    """What the parts of a row leave for the combining kernel.

    Args:
        sums: [R, H, splits, D] float32, of values, not divided by the totals.
        softmax: [R, H, splits, 2] float32, maximum (base 2) and total.
    """

    sums: torch.Tensor
    softmax: torch.Tensor


@triton.jit
def visible_range(
    kv_len: tl.tensor, window: tl.constexpr, block_n: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """First visible cached position, the same rounded down to a tile, and the end; the row's own token not counted."""
    end = tl.maximum(kv_len - 1, 0)
    first = end * 0
    if window > 0:
        first = tl.maximum(kv_len - window, 0)
    return first, tl.minimum(first // block_n * block_n, end), end


@triton.jit
def tokens_per_split(num_tokens: tl.tensor, num_splits: tl.tensor, block_n: tl.constexpr) -> tl.tensor:
    """A whole number of tiles."""
    return tl.maximum(tl.cdiv(tl.cdiv(num_tokens, num_splits), block_n), 1) * block_n


@triton.jit
def prefetch_rows(data: tl.tensor, rows: tl.tensor, inside: tl.tensor, head_dim: tl.constexpr) -> None:
    """Ask for `head_dim` numbers from each of the offsets `rows` [N] on to come to L2, where `inside`."""
    line: tl.constexpr = 128 // (data.dtype.element_ty.primitive_bitwidth // 8)
    num_lines: tl.constexpr = (head_dim + line - 1) // line
    lines = tl.arange(0, triton.next_power_of_2(num_lines)) % num_lines * line
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [data + tl.where(inside, rows, 0)[:, None] + lines[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_part(
    values: tl.tensor,  # [block_m, block_d], not divided by the totals
    maximum: tl.tensor,  # [block_m]
    total: tl.tensor,
    places: tl.tensor,  # [block_m] row * H + head
    heads: tl.tensor,  # [block_m]
    is_head: tl.tensor,
    split: tl.tensor,
    num_splits: tl.tensor,
    result: Result,
    partial: Partial | None,
    value_scale: tl.tensor,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Leave a part for the combining kernel; where there is one part only, store the result."""
    if partial is not None:
        dims = tl.arange(0, block_d)
        parts = places * num_splits + split
        tl.store(partial.softmax + parts * 2, maximum, mask=is_head)
        tl.store(partial.softmax + parts * 2 + 1, total, mask=is_head)
        is_element = is_head[:, None] & (dims < head_dim)
        tl.store(partial.sums + parts[:, None] * head_dim + dims, values, mask=is_element)
    else:
        store_result(values, maximum, total, places, heads, is_head, result, value_scale, head_dim, block_d)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["kv_lens"])
def _combine_kernel(
    partial: Partial,
    kv_lens: tl.tensor,
    result: Result,
    value_scale: float,
    num_splits: int,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    window: tl.constexpr,
    block_n: tl.constexpr,
    chunk: tl.constexpr,
    block_d: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """Grid: heads, rows. The parts that had work are known from the row's length; the others hold anything."""
    if overlaps:
        gdc_launch_dependents()
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, first, end = visible_range(tl.load(kv_lens + row), window, block_n)
    used = tl.maximum(tl.cdiv(end - first, tokens_per_split(end - first, num_splits, block_n)), 1)
    if overlaps:
        gdc_wait()
    base = (row * num_heads + head) * num_splits
    dims = tl.arange(0, block_d)
    maximum, total = float("-inf"), 0.0
    values = tl.zeros([block_d], tl.float32)
    for start in range(0, used, chunk):
        parts = start + tl.arange(0, chunk)
        is_used = parts < used
        pointers = partial.sums + (base + parts)[:, None] * head_dim + dims[None, :]
        part_values = tl.load(pointers, mask=is_used[:, None] & (dims < head_dim)[None, :], other=0.0)
        part_maxima = tl.load(partial.softmax + (base + parts) * 2, is_used, other=float("-inf"))
        part_totals = tl.load(partial.softmax + (base + parts) * 2 + 1, is_used, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(part_maxima, 0))
        decay, weights = tl.exp2(maximum - new_maximum), tl.exp2(part_maxima - new_maximum)
        total = total * decay + tl.sum(part_totals * weights, 0)
        values = values * decay + tl.sum(part_values * weights[:, None], 0)
        maximum = new_maximum
    lane = tl.arange(0, 1)
    store_result(
        values[None, :], maximum + lane, total + lane, row * num_heads + head + lane, head + lane, lane == 0, result,
        value_scale, head_dim, block_d,
    )  # fmt: skip


def new_partial(query: torch.Tensor, num_splits: int) -> Partial:
    """Room for what `num_splits` parts of each row of query [R, H, D] leave."""
    num_rows, num_heads, head_dim = query.shape
    return Partial(
        query.new_empty(num_rows, num_heads, num_splits, head_dim, dtype=torch.float32),
        query.new_empty(num_rows, num_heads, num_splits, 2, dtype=torch.float32),
    )


def combine(
    partial: Partial, kv_lens: torch.Tensor, result: Result, value_scale: float, cut: Mapping[str, int]
) -> None:
    """Put the parts together.

    Args:
        partial: what the parts left.
        kv_lens: [R] int32.
        result: written.
        value_scale: a cached value times this is the value.
        cut: constants of the kernel, those that the parts were computed with.
    """
    num_rows, num_heads, num_splits, _ = partial.sums.shape
    chunk = min(triton.next_power_of_2(num_splits), 64)
    _combine_kernel[(num_heads, num_rows)](
        partial,
        kv_lens,
        result,
        value_scale,
        num_splits,
        num_heads=num_heads,
        chunk=chunk,
        num_warps=4,
        launch_pdl=cut["overlaps"],
        **cut,
    )
