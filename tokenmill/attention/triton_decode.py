"""Attention of rows of one token (decode) by split-context flash decoding. Called by `triton.py`.

A program takes the query heads of one key/value head of one row, padded to 16, and a part of the row's cached tokens.
The row's own key and value come from the inputs; the program of the first part also writes them to the cache, so a
decode step needs no separate write. With more than one part, a second kernel combines them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tokenmill.attention.base import AttentionSpec, LayerCache
from tokenmill.attention.triton_common import (
    PagedCache,
    Scoring,
    StridedHeads,
    add_sink,
    cache_slots,
    load_blocks,
    load_tile,
    operand_type,
    paged,
    scores_base2,
    scoring,
    soft_cap_base2,
    softmax_step,
    strided,
    to_cached,
    triton_type,
)

MAX_SPLITS = 64
"""Parts of a row's context at most, where the number is free: more cost more to combine than they gain."""


class DecodeTiles(NamedTuple):
    """How the decode kernel is cut.

    Args:
        block_n: cached tokens in one step of the loop.
        num_warps: of a program.
        num_stages: steps whose loads are under way at a time.
        programs_per_multiprocessor: what the number of splits aims at.
    """

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int


class Partial(NamedTuple):
    """What the parts of a row leave for the combining kernel.

    Args:
        sums: [R, H, splits, D] float32, of values, not divided by the totals.
        softmax: [R, H, splits, 2] float32, maximum (base 2) and total.
    """

    sums: torch.Tensor
    softmax: torch.Tensor


def decode_tiles(head_dim: int, cache_itemsize: int) -> DecodeTiles:
    """Tiles by the bytes of one cached key."""
    key_bytes = triton.next_power_of_2(head_dim) * cache_itemsize
    if key_bytes <= 128:
        return DecodeTiles(128, 4, 3, 4)
    if key_bytes <= 256:
        return DecodeTiles(64, 4, 3, 4)
    return DecodeTiles(32, 4, 3, 4)


def choose_num_splits(num_programs: int, max_kv_len: int, num_multiprocessors: int, tiles: DecodeTiles) -> int:
    """Parts that each row's context is cut into, from what is fixed when a CUDA graph is captured.

    Args:
        num_programs: rows times key/value heads.
        max_kv_len: upper bound of the rows' cached tokens.
        num_multiprocessors: of the device.
        tiles: of the kernel.
    """
    wanted = num_multiprocessors * tiles.programs_per_multiprocessor // num_programs
    return max(1, min(wanted, triton.cdiv(max_kv_len, tiles.block_n), MAX_SPLITS))


@triton.jit
def _visible_range(
    kv_len: tl.tensor, window: tl.constexpr, block_n: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """First visible cached position, the same rounded down to a tile, and the end; the row's own token not counted."""
    end = tl.maximum(kv_len - 1, 0)
    first = end * 0
    if window > 0:
        first = tl.maximum(kv_len - window, 0)
    return first, tl.minimum(first // block_n * block_n, end), end


@triton.jit
def _tokens_per_split(
    num_tokens: tl.tensor, num_splits: tl.tensor, fixed: tl.constexpr, block_n: tl.constexpr
) -> tl.tensor:
    """A whole number of tiles; `fixed` if given, whatever the batch."""
    if fixed > 0:
        tokens = num_tokens * 0 + fixed
    else:
        tokens = tl.maximum(tl.cdiv(tl.cdiv(num_tokens, num_splits), block_n), 1) * block_n
    return tokens


@triton.jit
def _attend_part(
    query: tl.tensor,  # [block_m, block_d]
    cache: PagedCache,
    table: tl.tensor,  # pointer
    kv_head: tl.tensor,
    first_visible: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    factor: tl.tensor,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    cap: tl.constexpr,
    operands: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attend to cached positions start to end: sum of values [block_m, block_d], maximum and total [block_m]."""
    offsets = tl.arange(0, block_n)
    maximum = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    values = tl.zeros([block_m, block_d], tl.float32)
    blocks = load_blocks(table, start, first_visible, tl.maximum(end, 1), tokens_per_block, block_n)
    for tile in range(start, end, block_n):
        positions = tile + offsets
        inside = (positions >= first_visible) & (positions < end)
        rows = cache_slots(blocks, positions, tokens_per_block) * (num_kv_heads * head_dim) + kv_head * head_dim
        blocks = load_blocks(table, tile + block_n, first_visible, end, tokens_per_block, block_n)
        key = load_tile(cache.key_data, rows, inside, head_dim, block_d, True).to(operands)
        products = tl.dot(query, tl.trans(key), input_precision="ieee")
        weights, decay, maximum, total = softmax_step(products, inside[None, :], maximum, total, factor, cap, True)
        value = load_tile(cache.value_data, rows, inside, head_dim, block_d, True).to(operands)
        values = tl.dot(weights.to(operands), value, values * decay[:, None], input_precision="ieee")
    return values, maximum, total


@triton.jit
def _attend_own(
    query: tl.tensor,  # [block_m, block_d]
    own_key: tl.tensor,  # [block_d] as it lies in the cache
    own_value: tl.tensor,
    values: tl.tensor,  # [block_m, block_d] summed so far
    maximum: tl.tensor,  # [block_m]
    total: tl.tensor,
    factor: tl.tensor,
    cap: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attend to the row's own token too."""
    products = tl.sum(query.to(tl.float32) * own_key.to(tl.float32)[None, :], 1)
    scores = scores_base2(products, factor, cap)
    new_maximum = tl.maximum(maximum, scores)
    decay = tl.exp2(maximum - new_maximum)
    weight = tl.exp2(scores - new_maximum)
    values = values * decay[:, None] + weight[:, None] * own_value.to(tl.float32)[None, :]
    return values, new_maximum, total * decay + weight


@triton.jit
def _store_result(
    values: tl.tensor,  # [M, block_d], not divided by the totals
    maximum: tl.tensor,  # [M] base 2
    total: tl.tensor,  # [M]
    heads: tl.tensor,  # [M] which heads of the row
    is_head: tl.tensor,  # [M]
    row_heads: tl.tensor,  # row times H
    output: tl.tensor,  # pointers
    log_sum_exp: tl.tensor,
    sinks: tl.tensor,
    value_scale: tl.tensor,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    if log_sum_exp is not None:
        natural = (maximum + tl.log2(total)) * 0.6931471805599453
        tl.store(log_sum_exp + row_heads + heads, natural, mask=is_head)
    if sinks is not None:
        decay, total = add_sink(maximum, total, tl.load(sinks + heads, mask=is_head, other=0.0).to(tl.float32))
        values = values * decay[:, None]
    values = values * (value_scale / total)[:, None]
    dims = tl.arange(0, block_d)
    pointers = output + (row_heads + heads)[:, None] * head_dim + dims[None, :]
    tl.store(pointers, values.to(output.dtype.element_ty), mask=is_head[:, None] & (dims < head_dim)[None, :])


@triton.jit(
    do_not_specialize=["table_stride", "num_splits"],
    do_not_specialize_on_alignment=["kv_lens", "block_tables", "slot_mapping"],
)
def _decode_kernel(
    query: StridedHeads,
    key: StridedHeads,
    value: StridedHeads,
    cache: PagedCache,
    kv_lens: tl.tensor,
    block_tables: tl.tensor,
    table_stride: int,
    slot_mapping: tl.tensor,
    output: tl.tensor,
    log_sum_exp: tl.tensor,
    sinks: tl.tensor,
    partial: Partial,
    score: Scoring,
    num_splits: int,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    window: tl.constexpr,
    cap: tl.constexpr,
    operands: tl.constexpr,
    is_split: tl.constexpr,
    fixed: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Grid: key/value heads, splits, rows."""
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_visible, first, end = _visible_range(tl.load(kv_lens + row), window, block_n)
    tokens = _tokens_per_split(end - first, num_splits, fixed, block_n)
    start = first + split * tokens
    if (start < end) | (split == 0):
        heads, dims = kv_head * group + tl.arange(0, block_m), tl.arange(0, block_d)
        is_head, is_dim = tl.arange(0, block_m) < group, dims < head_dim
        rows = row * query.token_stride + heads * query.head_stride
        q = load_tile(query.data, rows, is_head, head_dim, block_d, True).to(operands)
        own_key = tl.load(key.data + row * key.token_stride + kv_head * key.head_stride + dims, is_dim, 0.0)
        own_value = tl.load(value.data + row * value.token_stride + kv_head * value.head_stride + dims, is_dim, 0.0)
        table = block_tables + row * table_stride
        values, maximum, total = _attend_part(
            q, cache, table, kv_head, first_visible, start, tl.minimum(start + tokens, end), score.factor,
            num_kv_heads, head_dim, tokens_per_block, cap, operands, block_m, block_n, block_d,
        )  # fmt: skip
        if split == 0:
            cached_key = to_cached(own_key, score.key_scale, cache.key_data)
            cached_value = to_cached(own_value, score.value_scale, cache.value_data)
            slot = (tl.load(slot_mapping + row) * num_kv_heads + kv_head) * head_dim
            tl.store(cache.key_data + slot + dims, cached_key, mask=is_dim)
            tl.store(cache.value_data + slot + dims, cached_value, mask=is_dim)
            values, maximum, total = _attend_own(q, cached_key, cached_value, values, maximum, total, score.factor, cap)
        row_heads = row * (num_kv_heads * group)
        if not is_split:
            _store_result(
                values, maximum, total, heads, is_head, row_heads, output, log_sum_exp, sinks, score.value_scale,
                head_dim, block_d,
            )  # fmt: skip
        else:
            parts = (row_heads + heads) * num_splits + split
            tl.store(partial.softmax + parts * 2, maximum, mask=is_head)
            tl.store(partial.softmax + parts * 2 + 1, total, mask=is_head)
            pointers = partial.sums + parts[:, None] * head_dim + dims[None, :]
            tl.store(pointers, values, mask=is_head[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["kv_lens"])
def _combine_kernel(
    partial: Partial,
    kv_lens: tl.tensor,
    output: tl.tensor,
    log_sum_exp: tl.tensor,
    sinks: tl.tensor,
    value_scale: float,
    num_splits: int,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    window: tl.constexpr,
    fixed: tl.constexpr,
    block_n: tl.constexpr,
    block_s: tl.constexpr,
    chunk: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Grid: heads, rows. The parts that had work are known from the row's length."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, first, end = _visible_range(tl.load(kv_lens + row), window, block_n)
    used = tl.maximum(tl.cdiv(end - first, _tokens_per_split(end - first, num_splits, fixed, block_n)), 1)
    base = (row * num_heads + head) * num_splits
    splits, dims = tl.arange(0, block_s), tl.arange(0, block_d)
    maximum = tl.max(tl.load(partial.softmax + (base + splits) * 2, mask=splits < used, other=float("-inf")), 0)
    total = maximum * 0
    values = tl.zeros([block_d], tl.float32)
    for start in range(0, used, chunk):
        parts = start + tl.arange(0, chunk)
        is_used = parts < used
        pointers = partial.sums + (base + parts)[:, None] * head_dim + dims[None, :]
        part_values = tl.load(pointers, mask=is_used[:, None] & (dims < head_dim)[None, :], other=0.0)
        weights = tl.exp2(tl.load(partial.softmax + (base + parts) * 2, is_used, other=float("-inf")) - maximum)
        total += tl.sum(tl.load(partial.softmax + (base + parts) * 2 + 1, is_used, other=0.0) * weights, 0)
        values += tl.sum(part_values * weights[:, None], 0)
    one = tl.arange(0, 1)
    _store_result(
        values[None, :], maximum + one, total + one, head + one, one == 0, row * num_heads, output, log_sum_exp, sinks,
        value_scale, head_dim, block_d,
    )  # fmt: skip


def decode_attention(
    spec: AttentionSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    kv_lens: torch.Tensor,
    block_tables: torch.Tensor,
    slot_mapping: torch.Tensor,
    output: torch.Tensor,
    *,
    num_splits: int,
    fixed_split_tokens: int = 0,
    sinks: torch.Tensor | None = None,
    log_sum_exp: torch.Tensor | None = None,
    tiles: DecodeTiles | None = None,
) -> None:
    """Write each row's key and value to the cache and attend to all of its tokens.

    Launches depend on shapes and host numbers alone, so they can be captured in a CUDA graph and replayed with other
    lengths, block tables and slots. A row of length 0 is padding: it reads nothing of the cache, and its key and value
    go to its slot.

    Args:
        spec: the layer.
        query, key, value: [R, H, D], [R, G, D], [R, G, D], any strides but 1 along D.
        cache: two tensors [N, B, G, D]; changed in place.
        kv_lens: [R] int32, the row's own token included.
        block_tables: [R, blocks] int32.
        slot_mapping: [R] int64.
        output: [R, H, D] contiguous, written.
        num_splits: see `choose_num_splits`.
        fixed_split_tokens: tokens of a part, a multiple of the tile; 0: as even as possible. Fixed, a row's result does
            not depend on the batch; `num_splits` of them must cover the longest row.
        sinks: [H], a score per head that takes probability and has no value.
        log_sum_exp: [R, H] float32, written: of the scores, sinks not counted.
        tiles: for tuning.
    """
    assert block_tables.stride(-1) == 1, "block tables must be contiguous along the blocks"
    num_rows, num_heads, head_dim = query.shape
    group = num_heads // spec.num_kv_heads
    tiles = tiles or decode_tiles(head_dim, cache[0].element_size())
    splits = (num_rows, num_heads, num_splits)
    partial = Partial(output, output)
    if num_splits > 1:
        partial = Partial(
            query.new_empty(*splits, head_dim, dtype=torch.float32), query.new_empty(*splits, 2, dtype=torch.float32)
        )
    cut = {
        "head_dim": head_dim,
        "window": spec.sliding_window or 0,
        "fixed": fixed_split_tokens,
        "block_n": tiles.block_n,
        "block_d": max(16, triton.next_power_of_2(head_dim)),
    }
    _decode_kernel[(spec.num_kv_heads, num_splits, num_rows)](
        strided(query),
        strided(key),
        strided(value),
        paged(cache),
        kv_lens,
        block_tables,
        block_tables.stride(0),
        slot_mapping,
        output,
        log_sum_exp,
        sinks,
        partial,
        scoring(spec),
        num_splits,
        num_kv_heads=spec.num_kv_heads,
        group=group,
        tokens_per_block=cache[0].shape[1],
        cap=soft_cap_base2(spec),
        operands=triton_type(operand_type(query.dtype, cache[0].dtype)),
        is_split=num_splits > 1,
        block_m=max(16, triton.next_power_of_2(group)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **cut,
    )
    if num_splits > 1:
        _combine_kernel[(num_heads, num_rows)](
            partial,
            kv_lens,
            output,
            log_sum_exp,
            sinks,
            spec.value_scale,
            num_splits,
            num_heads=num_heads,
            block_s=triton.next_power_of_2(num_splits),
            chunk=16 if fixed_split_tokens else min(triton.next_power_of_2(num_splits), 64),  # fixes the order of sums
            num_warps=4,
            **cut,
        )
