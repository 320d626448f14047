"""Attention of rows of one token (decode) by split-context flash decoding. Called by `triton.py`.

A program takes the query heads of one key/value head of one row, padded to 16, and a part of the row's cached tokens.
The row's own key and value come from the inputs; the program of the first part also writes them to the cache, so a
decode step needs no separate write. With more than one part, a second kernel combines them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.attention.triton_common import (
    PagedCache,
    Result,
    Scoring,
    StridedHeads,
    Turning,
    cache_slots,
    load_blocks,
    load_tile,
    load_turned,
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
from tokenmill.attention.triton_decode_float8 import attend_part_in_pairs
from tokenmill.attention.triton_decode_heads import decode_attention_of_heads
from tokenmill.attention.triton_decode_parts import (
    Partial,
    combine,
    new_partial,
    prefetch_rows,
    store_part,
    tokens_per_split,
    visible_range,
)
from tokenmill.attention.triton_decode_tiles import DecodeTiles
from tokenmill.ops.triton.launch import can_overlap


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
def _attend_cached(
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
    """`_attend_part`, in the way that suits the cache's type."""
    is_float8: tl.constexpr = cache.key_data.dtype.element_ty == tl.float8e4nv  # type: ignore[attr-defined]
    if is_float8 and operands == tl.float16 and head_dim == block_d:
        query_even, query_odd = tl.split(query.reshape(block_m, block_d // 2, 2))
        values, maximum, total = attend_part_in_pairs(
            query_even, query_odd, cache, table, kv_head, first_visible, start, end, factor, num_kv_heads, head_dim,
            tokens_per_block, cap, block_m, block_n,
        )  # fmt: skip
    else:
        values, maximum, total = _attend_part(
            query, cache, table, kv_head, first_visible, start, end, factor, num_kv_heads, head_dim, tokens_per_block,
            cap, operands, block_m, block_n, block_d,
        )  # fmt: skip
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
def _load_own(
    heads: StridedHeads,
    row: tl.tensor,
    kv_head: tl.tensor,
    turning: Turning | None,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
) -> tl.tensor:
    """[block_d] key or value of the row's own token."""
    one = tl.arange(0, 1)
    place = row * heads.token_stride + kv_head * heads.head_stride + one
    return load_turned(heads.data, place, one == 0, turning, row, head_dim, block_d).reshape(block_d)


@triton.jit
def _write_own(
    place: tl.tensor, own: tl.tensor, scale: tl.tensor, head_dim: tl.constexpr, block_d: tl.constexpr
) -> tl.tensor:
    """Store the row's own key or value [block_d] in the cache; returns it as it lies there."""
    dims = tl.arange(0, block_d)
    cached = to_cached(own, scale, place)
    tl.store(place + dims, cached, mask=dims < head_dim)
    return cached


@triton.jit
def _prefetch_first_tile(
    cache: PagedCache,
    table: tl.tensor,  # pointer
    kv_head: tl.tensor,
    first_visible: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    block_n: tl.constexpr,
) -> None:
    """Ask for the keys and values that a part begins with: they were written by steps before this one."""
    if start < end:
        blocks = load_blocks(table, start, first_visible, end, tokens_per_block, block_n)
        positions = start + tl.arange(0, block_n)
        inside = (positions >= first_visible) & (positions < end)
        rows = cache_slots(blocks, positions, tokens_per_block) * (num_kv_heads * head_dim) + kv_head * head_dim
        prefetch_rows(cache.key_data, rows, inside, head_dim)
        prefetch_rows(cache.value_data, rows, inside, head_dim)


@triton.jit(
    do_not_specialize=["table_stride", "num_splits"],
    do_not_specialize_on_alignment=["kv_lens", "block_tables", "slot_mapping"],
)
def _decode_kernel(
    query: StridedHeads,
    key: StridedHeads,
    value: StridedHeads,
    turning: Turning | None,
    cache: PagedCache,
    kv_lens: tl.tensor,
    block_tables: tl.tensor,
    table_stride: int,
    slot_mapping: tl.tensor,
    result: Result,
    partial: Partial | None,
    score: Scoring,
    num_splits: int,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    window: tl.constexpr,
    cap: tl.constexpr,
    operands: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
    overlaps: tl.constexpr,
    starts_early: tl.constexpr,
) -> None:
    """Grid: key/value heads, splits, rows."""
    if overlaps:
        gdc_launch_dependents()
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads, is_head = kv_head * group + tl.arange(0, block_m), tl.arange(0, block_m) < group
    table = block_tables + row * table_stride
    first_visible, first, end = visible_range(tl.load(kv_lens + row), window, block_n)
    tokens = tokens_per_split(end - first, num_splits, block_n)
    start = first + split * tokens
    if starts_early:  # the step's metadata and the cache are there, its queries are not
        _prefetch_first_tile(
            cache, table, kv_head, first_visible, start, end, num_kv_heads, head_dim, tokens_per_block, block_n
        )  # fmt: skip
        gdc_wait()
    rows = row * query.token_stride + heads * query.head_stride
    q = load_turned(query.data, rows, is_head, turning, row, head_dim, block_d).to(operands)
    own_key = _load_own(key, row, kv_head, turning, head_dim, block_d)
    own_value = _load_own(value, row, kv_head, None, head_dim, block_d)
    if (start < end) | (split == 0):
        values, maximum, total = _attend_cached(
            q, cache, table, kv_head, first_visible, start, tl.minimum(start + tokens, end), score.factor,
            num_kv_heads, head_dim, tokens_per_block, cap, operands, block_m, block_n, block_d,
        )  # fmt: skip
        if split == 0:
            slot = (tl.load(slot_mapping + row) * num_kv_heads + kv_head) * head_dim
            cached_key = _write_own(cache.key_data + slot, own_key, score.key_scale, head_dim, block_d)
            cached_value = _write_own(cache.value_data + slot, own_value, score.value_scale, head_dim, block_d)
            values, maximum, total = _attend_own(q, cached_key, cached_value, values, maximum, total, score.factor, cap)
        store_part(
            values, maximum, total, row * (num_kv_heads * group) + heads, heads, is_head, split, num_splits, result,
            partial, score.value_scale, head_dim, block_d,
        )  # fmt: skip


def decode_attention(
    spec: AttentionSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    result: Result,
    *,
    num_splits: int,
    tiles: DecodeTiles,
    turning: Turning | None = None,
) -> None:
    """Write the key and value of each of the first R rows to the cache and attend to all of the row's tokens.

    Launches depend on shapes and host numbers alone, so they can be captured in a CUDA graph and replayed with other
    lengths, block tables and slots. A row of length 0 is padding: it reads nothing of the cache, and its key and value
    go to its slot.

    Args:
        spec: the layer.
        query, key, value: [R, H, D], [R, G, D], [R, G, D], any strides but 1 along D.
        cache: two tensors [N, B, G, D]; changed in place.
        metadata: its `kv_lens`, `block_tables` and `slot_mapping` are read.
        result: of the R rows, written.
        num_splits: see `choose_num_splits`.
        tiles: see `decode_tiles`.
        turning: queries and keys are turned by these angles first; None: they are as they should be.
    """
    if tiles.kv_heads is not None:
        assert num_splits == 1, "contexts of several heads a program are not cut"
        decode_attention_of_heads(
            spec, query, key, value, cache, metadata, result, tiles=tiles, turning=turning
        )  # fmt: skip
        return
    head_dim = query.shape[2]
    partial = None if num_splits == 1 else new_partial(query, num_splits)
    cut = {
        "head_dim": head_dim,
        "window": spec.sliding_window or 0,
        "block_n": tiles.block_n,
        "block_d": max(16, triton.next_power_of_2(head_dim)),
        "overlaps": can_overlap(query.device),
    }
    _launch_decode(spec, query, key, value, turning, cache, metadata, result, partial, num_splits, tiles, cut)
    if partial is not None:
        combine(partial, metadata.kv_lens, result, spec.value_scale, cut)


def _launch_decode(
    spec: AttentionSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    turning: Turning | None,
    cache: LayerCache,
    metadata: AttentionMetadata,
    result: Result,
    partial: Partial | None,
    num_splits: int,
    tiles: DecodeTiles,
    cut: dict[str, int],
) -> None:
    group = spec.num_heads // spec.num_kv_heads
    # Programs that wait take the place of others that work: for few rows alone, which are those that are split.
    starts_early = bool(cut["overlaps"]) and num_splits > 1
    _decode_kernel[(spec.num_kv_heads, num_splits, query.shape[0])](
        strided(query),
        strided(key),
        strided(value),
        turning,
        paged(cache),
        metadata.kv_lens,
        metadata.block_tables,
        metadata.block_tables.stride(0),
        metadata.slot_mapping,
        result,
        partial,
        scoring(spec),
        num_splits,
        num_kv_heads=spec.num_kv_heads,
        group=group,
        tokens_per_block=cache[0].shape[1],
        cap=soft_cap_base2(spec),
        operands=triton_type(operand_type(query.dtype, cache[0].dtype)),
        block_m=max(16, triton.next_power_of_2(group)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        starts_early=starts_early,
        launch_pdl=starts_early,
        **cut,
    )
