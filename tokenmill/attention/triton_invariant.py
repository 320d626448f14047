"""Attention whose result for a token depends on the token and its context alone: one kernel for prompts and decode.

A token's context is cut into splits at fixed positions. Each is summed by itself, tile after tile, and the splits are
added up in their order: by one program that goes through all of them, or by a second kernel where few tokens leave the
device room for a program of each split. Keys and values are read from the cache, also those of the step. So it does
not matter which tokens were computed together, in how many steps, or what was cached. Called by `triton.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.attention.triton_common import (
    PagedCache,
    Result,
    Scoring,
    StridedHeads,
    cache_slots,
    load_blocks,
    load_tile,
    operand_type,
    paged,
    scoring,
    soft_cap_base2,
    softmax_step,
    store_result,
    strided,
    triton_type,
)
from tokenmill.attention.triton_kv_write import write_kv_triton
from tokenmill.ops.platform import num_multiprocessors

MAX_PARTIAL_BYTES = 1 << 28
"""More than this for parts of results is not taken: one program then goes through all splits."""


class InvariantTiles(NamedTuple):
    """How the kernel is cut, for all steps of a model: the order of sums follows from it.

    Args:
        block_m: queries times heads of a tile.
        block_n: keys in one step of the loop.
        split: tokens of a split, a multiple of `block_n`.
        num_warps, num_stages: of a program.
    """

    block_m: int
    block_n: int
    split: int
    num_warps: int
    num_stages: int


class SplitParts(NamedTuple):
    """What programs of single splits leave: sums [T, H, splits, D] and maximum and total [T, H, splits, 2], float32."""

    sums: torch.Tensor
    softmax: torch.Tensor


def invariant_tiles(head_dim: int, operand_itemsize: int) -> InvariantTiles:
    """Tiles by head size and bytes of a number that is multiplied."""
    if operand_itemsize == 4:  # no matrix units: larger tiles only spill
        return InvariantTiles(16, 16, 64, 4, 2)
    return InvariantTiles(64, 64 if head_dim <= 128 else 32, 512, 4, 3 if head_dim <= 128 else 2)


@triton.jit
def _row_of(
    query_start: tl.tensor, index: tl.tensor, num_rows: tl.tensor, divisor: tl.constexpr, spare: tl.constexpr
) -> tl.tensor:
    """The row of token `index`, or of tile `index` of `divisor` tokens; each row has `spare` tiles to spare."""
    low = num_rows * 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // divisor + middle * spare <= index:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _add_split(
    values: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    split_values: tl.tensor,
    split_maximum: tl.tensor,
    split_total: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The online softmax of splits [M, D], [M], [M]; one that saw nothing changes nothing.

    Multiplications and additions are joined as written, so that all kernels round in the same places.
    """
    new_maximum = tl.maximum(maximum, split_maximum)
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    decay, weight = tl.exp2(maximum - reference), tl.exp2(split_maximum - reference)
    values = tl.fma(values, tl.broadcast_to(decay[:, None], values.shape), split_values * weight[:, None])
    return values, new_maximum, tl.fma(total, decay, split_total * weight)


@triton.jit
def _attend_split(
    query: tl.tensor,  # [block_m, block_d]
    positions: tl.tensor,  # [block_m]
    cache: PagedCache,
    table: tl.tensor,  # pointer
    kv_head: tl.tensor,
    first_visible: tl.tensor,  # to any query
    start: tl.tensor,  # a multiple of block_n
    end: tl.tensor,
    factor: tl.tensor,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    window: tl.constexpr,
    cap: tl.constexpr,
    operands: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Sum of values, maximum and total over positions start to end."""
    maximum = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    values = tl.zeros([block_m, block_d], tl.float32)
    blocks = load_blocks(table, start, first_visible, tl.maximum(end, 1), tokens_per_block, block_n)
    for tile in range(start, end, block_n):
        keys = tile + tl.arange(0, block_n)
        inside = (keys >= first_visible) & (keys < end)
        rows = cache_slots(blocks, keys, tokens_per_block) * (num_kv_heads * head_dim) + kv_head * head_dim
        blocks = load_blocks(table, tile + block_n, first_visible, end, tokens_per_block, block_n)
        key = load_tile(cache.key_data, rows, inside, head_dim, block_d, True).to(operands)
        products = tl.dot(query, tl.trans(key), input_precision="ieee")
        visible = inside[None, :] & (keys[None, :] <= positions[:, None])
        if window > 0:
            visible = visible & (keys[None, :] > positions[:, None] - window)
        weights, decay, maximum, total = softmax_step(products, visible, maximum, total, factor, cap, True)
        value = load_tile(cache.value_data, rows, inside, head_dim, block_d, True).to(operands)
        values = tl.dot(weights.to(operands), value, values * decay[:, None], input_precision="ieee")
    return values, maximum, total


@triton.jit
def _attend_splits(
    query: tl.tensor,  # [block_m, block_d]
    positions: tl.tensor,  # [block_m]
    cache: PagedCache,
    table: tl.tensor,  # pointer
    kv_head: tl.tensor,
    first_visible: tl.tensor,  # to any query
    begin: tl.tensor,  # number of the first split
    stop: tl.tensor,
    end: tl.tensor,
    factor: tl.tensor,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    window: tl.constexpr,
    cap: tl.constexpr,
    operands: tl.constexpr,
    split_tokens: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Sum of values, maximum and total over splits begin to stop, as far as `end`."""
    maximum = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    values = tl.zeros([block_m, block_d], tl.float32)
    from_tile = first_visible // block_n * block_n
    for split in range(begin, stop):
        split_values, split_maximum, split_total = _attend_split(
            query, positions, cache, table, kv_head, first_visible, tl.maximum(split * split_tokens, from_tile),
            tl.minimum((split + 1) * split_tokens, end), factor, num_kv_heads, head_dim, tokens_per_block, window, cap,
            operands, block_m, block_n, block_d,
        )  # fmt: skip
        values, maximum, total = _add_split(values, maximum, total, split_values, split_maximum, split_total)
    return values, maximum, total


@triton.jit
def _store_part(
    values: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    slots: tl.tensor,  # [block_m]
    is_query: tl.tensor,
    parts: SplitParts,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Leave a split for `_add_attention_splits_kernel`."""
    dims = tl.arange(0, block_d)
    is_element = is_query[:, None] & (dims < head_dim)[None, :]
    tl.store(parts.softmax + slots * 2, maximum, mask=is_query)
    tl.store(parts.softmax + slots * 2 + 1, total, mask=is_query)
    tl.store(parts.sums + slots[:, None] * head_dim + dims[None, :], values, mask=is_element)


@triton.jit(
    do_not_specialize=["table_stride", "num_rows", "num_splits"],
    do_not_specialize_on_alignment=["query_start", "kv_lens", "block_tables"],
)
def _attention_kernel(
    query: StridedHeads,
    cache: PagedCache,
    query_start: tl.tensor,
    kv_lens: tl.tensor,
    block_tables: tl.tensor,
    table_stride: int,
    result: Result,
    parts: SplitParts | None,
    score: Scoring,
    num_rows: int,
    num_splits: int,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    window: tl.constexpr,
    cap: tl.constexpr,
    operands: tl.constexpr,
    split_tokens: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Grid: key/value heads, splits (one program for all of them without `parts`), tiles of queries."""
    queries_per_tile: tl.constexpr = block_m // group
    kv_head, tile = tl.program_id(0), tl.program_id(2)
    row = _row_of(query_start, tile, num_rows, queries_per_tile, 1)
    row_start = tl.load(query_start + row)
    query_len = tl.load(query_start + row + 1) - row_start
    kv_len = tl.load(kv_lens + row)
    first = (tile - row_start // queries_per_tile - row) * queries_per_tile
    if first < query_len:
        lanes = tl.arange(0, block_m)
        indices, heads = first + lanes // group, kv_head * group + lanes % group
        is_query = (lanes < queries_per_tile * group) & (indices < query_len)
        positions = kv_len - query_len + indices
        tokens = row_start.to(tl.int64) + indices
        sources = tokens * query.token_stride + heads * query.head_stride
        q = load_tile(query.data, sources, is_query, head_dim, block_d, True).to(operands)
        end = kv_len - query_len + tl.minimum(first + queries_per_tile, query_len)
        first_visible = end * 0
        if window > 0:
            first_visible = tl.maximum(kv_len - query_len + first + 1 - window, 0)
        table, places = block_tables + row.to(tl.int64) * table_stride, tokens * (num_kv_heads * group) + heads
        begin, stop = first_visible // split_tokens, tl.cdiv(end, split_tokens)
        if parts is not None:
            begin += tl.program_id(1)
            stop = tl.minimum(begin + 1, stop)
        values, maximum, total = _attend_splits(
            q, positions, cache, table, kv_head, first_visible, begin, stop, end, score.factor, num_kv_heads, head_dim,
            tokens_per_block, window, cap, operands, split_tokens, block_m, block_n, block_d,
        )  # fmt: skip
        if parts is None:
            total = tl.where(total == 0.0, 1.0, total)  # a row that pads the batch
            store_result(values, maximum, total, places, heads, is_query, result, score.value_scale, head_dim, block_d)
        elif begin < stop:
            # A split's place follows from its number: tokens of a tile may begin with different ones.
            slots = places * num_splits + begin % num_splits
            _store_part(values, maximum, total, slots, is_query, parts, head_dim, block_d)


@triton.jit(do_not_specialize=["num_rows", "num_splits"], do_not_specialize_on_alignment=["query_start", "kv_lens"])
def _add_attention_splits_kernel(
    parts: SplitParts,
    query_start: tl.tensor,
    kv_lens: tl.tensor,
    result: Result,
    value_scale: float,
    num_rows: int,
    num_splits: int,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    window: tl.constexpr,
    split_tokens: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Grid: heads, tokens."""
    head, token = tl.program_id(0), tl.program_id(1)
    row = _row_of(query_start, token, num_rows, 1, 0)
    kv_len, after = tl.load(kv_lens + row), tl.load(query_start + row + 1) - token
    end = tl.maximum(kv_len - after + 1, 0)
    first = end * 0
    if window > 0:
        first = tl.maximum(end - window, 0) // split_tokens
    lane, dims = tl.arange(0, 1), tl.arange(0, block_d)
    place = token.to(tl.int64) * num_heads + head + lane
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    values = tl.zeros([1, block_d], tl.float32)
    for split in range(first, tl.cdiv(end, split_tokens)):
        slots = place * num_splits + split % num_splits
        is_dim = (dims < head_dim)[None, :]
        split_values = tl.load(parts.sums + slots[:, None] * head_dim + dims[None, :], mask=is_dim, other=0.0)
        split_maximum, split_total = tl.load(parts.softmax + slots * 2), tl.load(parts.softmax + slots * 2 + 1)
        values, maximum, total = _add_split(values, maximum, total, split_values, split_maximum, split_total)
    total = tl.where(total == 0.0, 1.0, total)
    store_result(values, maximum, total, place, head + lane, lane == 0, result, value_scale, head_dim, block_d)


def invariant_attention(
    spec: AttentionSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    result: Result,
    *,
    tiles: InvariantTiles | None = None,
    splits_programs: bool | None = None,
) -> None:
    """Write keys and values of all rows to the cache and attend causally to all that each token sees.

    Args:
        query, key, value: [T, H, D], [T, G, D], [T, G, D], any strides but 1 along D.
        cache: two tensors [N, B, G, D]; changed in place.
        result: of the T tokens, written.
        tiles: the same for all steps; None: the usual ones.
        splits_programs: whether each split has a program, which changes no bit; None: as the step's size suggests.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_rows, group = len(metadata.query_lens), num_heads // spec.num_kv_heads
    write_kv_triton(spec, key, value, cache, metadata.slot_mapping)
    operands = operand_type(query.dtype, cache[0].dtype)
    tiles = tiles or invariant_tiles(head_dim, operands.itemsize)
    block_m = max(tiles.block_m, triton.next_power_of_2(group))
    num_tiles = num_tokens // (block_m // group) + num_rows
    num_splits = _num_splits(spec, metadata.kv_len_bound, tiles.split, block_m // group)
    if splits_programs is None:
        is_small = num_tiles * spec.num_kv_heads < 2 * num_multiprocessors(query.device)
        splits_programs = num_splits > 1 and is_small and query.numel() * num_splits * 4 <= MAX_PARTIAL_BYTES
    parts = None
    if splits_programs:
        sums = query.new_empty(num_tokens, num_heads, num_splits, head_dim, dtype=torch.float32)
        parts = SplitParts(sums, query.new_empty(num_tokens, num_heads, num_splits, 2, dtype=torch.float32))
    cut: dict[str, Any] = {
        "head_dim": head_dim,
        "window": spec.sliding_window or 0,
        "split_tokens": tiles.split,
        "block_d": max(16, triton.next_power_of_2(head_dim)),
    }
    _attention_kernel[(spec.num_kv_heads, num_splits if parts is not None else 1, num_tiles)](
        strided(query), paged(cache), metadata.query_start, metadata.kv_lens, metadata.block_tables,
        metadata.block_tables.stride(0), result, parts, scoring(spec), num_rows, num_splits, spec.num_kv_heads, group,
        tokens_per_block=cache[0].shape[1],
        cap=soft_cap_base2(spec),
        operands=triton_type(operands),
        block_m=block_m,
        block_n=tiles.block_n,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **cut,
    )  # fmt: skip
    if parts is not None:
        _add_attention_splits_kernel[(num_heads, num_tokens)](
            parts, metadata.query_start, metadata.kv_lens, result, spec.value_scale, num_rows, num_splits,
            num_heads=num_heads,
            num_warps=1,
            **cut,
        )  # fmt: skip


def _num_splits(spec: AttentionSpec, max_kv_len: int, split_tokens: int, queries_per_tile: int) -> int:
    """Splits that the queries of a tile see at most; a window may begin within one."""
    if spec.sliding_window is None:
        return -(-max_kv_len // split_tokens)
    return -(-min(max_kv_len, spec.sliding_window + queries_per_tile) // split_tokens) + 1
