"""Attention of rows of several tokens (prefill, chunks of it) over the paged cache. Called by `triton.py`.

A program takes a tile of queries: `block_m // group` tokens of one row with all query heads of one key/value head, so
that a short chunk still fills the matrix units. It walks over the row's history in the paged cache, then over this
step's own keys and values, which it reads from the inputs: they lie side by side there. Tiles are found on the device
(`_find_tile`); the host only bounds their number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

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
    operand_type,
    paged,
    scoring,
    soft_cap_base2,
    softmax_step,
    store_result,
    strided,
    triton_type,
)
from tokenmill.attention.triton_prefill_queries import load_float8_queries, load_queries
from tokenmill.ops.platform import is_hopper_or_newer


class PrefillTiles(NamedTuple):
    """How the prefill kernel is cut.

    Args:
        block_m: queries times heads of a tile.
        block_n: keys in one step of the loop.
        num_warps: of a program.
        num_stages: steps whose loads are under way at a time.
        max_registers: of a thread; None: what the compiler takes.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


FLOAT8_TILES = PrefillTiles(64, 64, 4, 3, max_registers=168)
"""Of queries and keys in float8, found like the others: three programs on a multiprocessor."""


def prefill_tiles(head_dim: int, rows_needed: int, operand_itemsize: int, has_history: bool) -> PrefillTiles:
    """Tiles, found on an H100 with `benchmarks.gpu.attention --tune`.

    Without history all tiles are fetched by the bulk copy engine, which leaves registers enough for two programs of 8
    warps on a multiprocessor: one multiplies while the other one computes its softmax.

    Args:
        head_dim: D.
        rows_needed: queries times heads of a key/value head of the longest row.
        operand_itemsize: bytes of a number that is multiplied.
        has_history: whether rows may have cached tokens.
    """
    if operand_itemsize == 4:  # no matrix units: larger tiles only spill
        return PrefillTiles(16, 16, 4, 2)
    if rows_needed <= 64:  # one size for all of them: each is compiled when it is first needed
        return PrefillTiles(64, 64 if head_dim <= 128 else 32, 4, 3)
    if head_dim > 128:
        return PrefillTiles(128, 64, 8, 2)
    if has_history or head_dim != triton.next_power_of_2(head_dim):
        return PrefillTiles(128, 64, 8, 3)
    if rows_needed <= 512:
        return PrefillTiles(64, 32, 4, 3)
    if head_dim <= 64:
        return PrefillTiles(64, 64, 4, 2)
    return PrefillTiles(128, 64, 8, 2, max_registers=128)


@triton.jit
def _find_tile(
    query_start: tl.tensor, tile: tl.tensor, num_rows: tl.tensor, queries_per_tile: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The row that a tile belongs to, by bisection; its first token, its tokens, and the tile's first of them.

    Row r begins with tile `tokens before r // queries_per_tile + r`: a little room to spare, but no prefix sum.
    """
    before = tl.load(query_start)
    low = num_rows * 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(query_start + middle) - before) // queries_per_tile + middle <= tile:
            low = middle
        else:
            high = middle
    start = tl.load(query_start + low)
    first = (tile - (start - before) // queries_per_tile - low) * queries_per_tile
    return low, start, tl.load(query_start + low + 1) - start, first


@triton.jit
def _attend_history(
    query: tl.tensor,  # [block_m, block_d]
    positions: tl.tensor,  # [block_m] of the queries
    values: tl.tensor,  # [block_m, block_d] summed so far
    maximum: tl.tensor,  # [block_m]
    total: tl.tensor,
    cache: PagedCache,
    table: tl.tensor,  # pointer
    kv_head: tl.tensor,
    first_visible: tl.tensor,  # to any query: blocks that the window has left are not the row's any more
    start: tl.tensor,
    end: tl.tensor,
    factor: tl.tensor,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    window: tl.constexpr,
    cap: tl.constexpr,
    masked: tl.constexpr,
    causal: tl.constexpr,
    operands: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attend to cached positions start to end; unmasked, they are whole tiles that all see.

    Unless it is `causal`, all are before the step. Keys are multiplied in the queries' type.
    """
    offsets = tl.arange(0, block_n)
    blocks = load_blocks(table, start, first_visible, tl.maximum(end, 1), tokens_per_block, block_n)
    for tile in range(start, end, block_n):
        keys = tile + offsets
        inside = (keys >= first_visible) & (keys < end)
        rows = cache_slots(blocks, keys, tokens_per_block) * (num_kv_heads * head_dim) + kv_head * head_dim
        blocks = load_blocks(table, tile + block_n, first_visible, end, tokens_per_block, block_n)
        key = load_tile(cache.key_data, rows, inside, head_dim, block_d, masked).to(query.dtype)
        products = tl.dot(query, tl.trans(key), input_precision="ieee")
        visible = inside[None, :]
        if causal:
            visible = visible & (keys[None, :] <= positions[:, None])
        if window > 0:
            visible = visible & (keys[None, :] > positions[:, None] - window)
        weights, decay, maximum, total = softmax_step(
            products, visible, maximum, total, factor, cap, masked, factor_per_query=query.dtype == tl.float8e4nv
        )  # fmt: skip
        value = load_tile(cache.value_data, rows, inside, head_dim, block_d, masked).to(operands)
        values = tl.dot(weights.to(operands), value, values * decay[:, None], input_precision="ieee")
    return values, maximum, total


@triton.jit
def _load_step_tile(
    heads: StridedHeads,
    descriptor: tl.tensor_descriptor | None,
    token: tl.tensor,  # the row's first
    kv_head: tl.tensor,
    tile: tl.tensor,
    inside: tl.tensor,  # [block_n], unused unless masked
    head_dim: tl.constexpr,
    masked: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> tl.tensor:
    """[block_n, block_d] keys or values of this step; zero where not `inside`, which may be another row's."""
    if descriptor is None:
        pointer = heads.data + token * heads.token_stride + kv_head * heads.head_stride + tile * heads.token_stride
        rows = tl.arange(0, block_n) * heads.token_stride
        numbers = load_tile(pointer, rows, inside, head_dim, block_d, masked)
    else:
        numbers = descriptor.load([(token + tile).to(tl.int32), (kv_head * heads.head_stride).to(tl.int32)])
        if masked:
            numbers = tl.where(inside[:, None], numbers, 0.0)
    return numbers


@triton.jit
def _attend_step(
    query: tl.tensor,  # [block_m, block_d]
    indices: tl.tensor,  # [block_m] of the queries in the row's tokens of this step
    values: tl.tensor,  # [block_m, block_d] summed so far
    maximum: tl.tensor,  # [block_m]
    total: tl.tensor,
    key: StridedHeads,
    value: StridedHeads,
    key_descriptor: tl.tensor_descriptor | None,
    value_descriptor: tl.tensor_descriptor | None,
    token: tl.tensor,  # the row's first
    kv_head: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    factor: tl.tensor,
    head_dim: tl.constexpr,
    window: tl.constexpr,
    cap: tl.constexpr,
    masked: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attend to the row's tokens start to end of this step; unmasked, they are whole tiles that all queries see."""
    offsets = tl.arange(0, block_n)
    for tile in range(start, end, block_n):
        keys = tile + offsets
        inside = keys < end
        key_tile = _load_step_tile(
            key, key_descriptor, token, kv_head, tile, inside, head_dim, masked, block_n, block_d
        )  # fmt: skip
        products = tl.dot(query, tl.trans(key_tile.to(query.dtype)), input_precision="ieee")
        visible = inside[None, :]
        if masked:
            visible = visible & (keys[None, :] <= indices[:, None])
        if window > 0:
            visible = visible & (keys[None, :] > indices[:, None] - window)
        weights, decay, maximum, total = softmax_step(products, visible, maximum, total, factor, cap, masked)
        value_tile = _load_step_tile(
            value, value_descriptor, token, kv_head, tile, inside, head_dim, masked, block_n, block_d
        )  # fmt: skip
        value_tile = value_tile.to(query.dtype)
        values = tl.dot(weights.to(query.dtype), value_tile, values * decay[:, None], input_precision="ieee")
    return values, maximum, total


@triton.jit(
    do_not_specialize=["table_stride", "num_rows", "num_tiles"],
    do_not_specialize_on_alignment=["query_start", "kv_lens", "block_tables"],
)
def _prefill_kernel(
    query: StridedHeads,
    turning: Turning | None,
    key: StridedHeads | None,
    value: StridedHeads | None,
    key_descriptor: tl.tensor_descriptor | None,
    value_descriptor: tl.tensor_descriptor | None,
    cache: PagedCache,
    query_start: tl.tensor,
    kv_lens: tl.tensor,
    block_tables: tl.tensor,
    table_stride: int,
    result: Result,
    score: Scoring,
    num_rows: int,
    num_tiles: int,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    window: tl.constexpr,
    cap: tl.constexpr,
    operands: tl.constexpr,
    has_history: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Grid: tiles times key/value heads. Late tiles, which see most, run first: short ones fill the gaps at the end."""
    queries_per_tile: tl.constexpr = block_m // group
    kv_head, tile = tl.program_id(0) % num_kv_heads, num_tiles - 1 - tl.program_id(0) // num_kv_heads
    row, row_start, query_len, first = _find_tile(query_start, tile, num_rows, queries_per_tile)
    if first < query_len:
        lanes = tl.arange(0, block_m)
        indices, heads = first + lanes // group, kv_head * group + lanes % group
        is_query = (lanes < queries_per_tile * group) & (indices < query_len)
        token = row_start.to(tl.int64)
        places = (token + indices) * (num_kv_heads * group) + heads
        rows = (token + indices) * query.token_stride + heads * query.head_stride
        history, table = tl.load(kv_lens + row) - query_len, block_tables + row.to(tl.int64) * table_stride
        last = tl.minimum(first + queries_per_tile, query_len)
        if key is None:
            q, scales = load_float8_queries(
                query, turning, rows, token + indices, is_query, result.output, places * head_dim, head_dim, block_d
            )  # fmt: skip
            values, maximum, total = _attend_cache(
                q, scales * score.factor, history + indices, history + first, history + last, cache, table, kv_head,
                num_kv_heads, head_dim, tokens_per_block, cap, operands, block_m, block_n, block_d,
            )  # fmt: skip
        else:
            q = load_queries(
                query, turning, rows, token + indices, is_query, result.output, places * head_dim, operands, head_dim,
                block_d,
            )  # fmt: skip
            values, maximum, total = _attend(
                q, indices, first, last, history, cache, table, kv_head, key, value, key_descriptor, value_descriptor,
                token, score.factor, num_kv_heads, head_dim, tokens_per_block, window, cap, operands, has_history,
                block_m, block_n, block_d,
            )  # fmt: skip
        store_result(values, maximum, total, places, heads, is_query, result, score.value_scale, head_dim, block_d)


@triton.jit
def _attend(
    query: tl.tensor,  # [block_m, block_d]
    indices: tl.tensor,  # [block_m]
    first: tl.tensor,  # query of the tile, and the end, in the row's tokens of this step
    last: tl.tensor,
    history: tl.tensor,  # tokens of the row before this step
    cache: PagedCache,
    table: tl.tensor,
    kv_head: tl.tensor,
    key: StridedHeads,
    value: StridedHeads,
    key_descriptor: tl.tensor_descriptor | None,
    value_descriptor: tl.tensor_descriptor | None,
    token: tl.tensor,  # the row's first
    factor: tl.tensor,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    window: tl.constexpr,
    cap: tl.constexpr,
    operands: tl.constexpr,
    has_history: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Sum of values [block_m, block_d], maximum and total [block_m], of a tile of queries over all that they see."""
    maximum = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    values = tl.zeros([block_m, block_d], tl.float32)
    if has_history:
        first_visible, whole = history * 0, history // block_n * block_n
        if window > 0:  # every tile is masked
            first_visible = tl.minimum(tl.maximum(history + first + 1 - window, 0), history)
            whole = tl.where(first_visible < history, first_visible // block_n * block_n, history)
        else:
            values, maximum, total = _attend_history(
                query, history + indices, values, maximum, total, cache, table, kv_head, first_visible, 0, whole,
                factor, num_kv_heads, head_dim, tokens_per_block, window, cap, False, False, operands, block_n, block_d,
            )  # fmt: skip
        values, maximum, total = _attend_history(
            query, history + indices, values, maximum, total, cache, table, kv_head, first_visible, whole, history,
            factor, num_kv_heads, head_dim, tokens_per_block, window, cap, True, False, operands, block_n, block_d,
        )  # fmt: skip
    whole = (first + 1) // block_n * block_n
    if window > 0:
        whole = tl.maximum(first + 1 - window, 0) // block_n * block_n
    else:
        values, maximum, total = _attend_step(
            query, indices, values, maximum, total, key, value, key_descriptor, value_descriptor, token, kv_head,
            0, whole, factor, head_dim, window, cap, False, block_n, block_d,
        )  # fmt: skip
    return _attend_step(
        query, indices, values, maximum, total, key, value, key_descriptor, value_descriptor, token, kv_head,
        whole, last, factor, head_dim, window, cap, True, block_n, block_d,
    )  # fmt: skip


@triton.jit
def _attend_cache(
    query: tl.tensor,  # [block_m, block_d] float8
    factor: tl.tensor,  # [block_m]
    positions: tl.tensor,  # [block_m] of the queries
    first: tl.tensor,  # position of a query of the tile
    end: tl.tensor,  # behind the last one
    cache: PagedCache,
    table: tl.tensor,
    kv_head: tl.tensor,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    cap: tl.constexpr,
    operands: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """`_attend` of float8 queries with cached keys as they lie: this step's tokens are in the cache already."""
    maximum = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    values = tl.zeros([block_m, block_d], tl.float32)
    whole = (first + 1) // block_n * block_n
    values, maximum, total = _attend_history(
        query, positions, values, maximum, total, cache, table, kv_head, first * 0, 0, whole, factor, num_kv_heads,
        head_dim, tokens_per_block, 0, cap, False, False, operands, block_n, block_d,
    )  # fmt: skip
    return _attend_history(
        query, positions, values, maximum, total, cache, table, kv_head, first * 0, whole, end, factor, num_kv_heads,
        head_dim, tokens_per_block, 0, cap, True, True, operands, block_n, block_d,
    )  # fmt: skip


def _describe(heads: torch.Tensor, block_n: int) -> TensorDescriptor | None:
    """What the bulk copy engine needs to fetch [block_n, D] of one head; None where it cannot."""
    num_tokens, num_heads, head_dim = heads.shape
    token_stride, head_stride, _ = heads.stride()
    size = heads.element_size()
    aligned = heads.data_ptr() % 16 == 0 and token_stride * size % 16 == 0
    if not (
        is_hopper_or_newer(heads.device)
        and aligned
        and head_dim == triton.next_power_of_2(head_dim)
        and 16 <= head_dim <= 256  # what a tile is wide: block_d
    ):
        return None
    width = (num_heads - 1) * head_stride + head_dim
    return TensorDescriptor(heads, [num_tokens, width], [token_stride, 1], [block_n, head_dim])


def prefill_attention(
    spec: AttentionSpec,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    cache: LayerCache,
    metadata: AttentionMetadata,
    result: Result,
    *,
    rows: slice,
    has_history: bool,
    tiles: PrefillTiles | None = None,
    turning: Turning | None = None,
) -> None:
    """Attend causally over history and this step's tokens of some neighbouring rows. Writes no cache.

    Args:
        query: [T, H, D], all tokens of the step, any strides but 1 along D.
        key, value: [T, G, D], likewise; as a later step will read them but for the scales (see `write_kv_triton`).
            None: they are read from the cache, which is of float8, and multiplied with queries in float8; no window.
        cache: two tensors [N, B, G, D] with the rows' history.
        metadata: its `query_start`, `kv_lens`, `block_tables` are read; of `query_lens` upper bounds will do.
        rows: which rows of the step.
        has_history: whether any of them may have cached tokens from before.
        tiles: for tuning.
        turning: queries are turned by these angles first; None: they are as they should be. Keys always are.
    """
    _, num_heads, head_dim = query.shape
    query_lens, block_tables = metadata.query_lens[rows], metadata.block_tables[rows]
    num_rows, num_tokens = len(query_lens), min(sum(query_lens), query.shape[0])
    group = num_heads // spec.num_kv_heads
    operands = operand_type(query.dtype, cache[0].dtype)
    if tiles is None and key is None:
        tiles = FLOAT8_TILES
    tiles = tiles or prefill_tiles(head_dim, max(query_lens) * group, operands.itemsize, has_history)
    block_m = max(tiles.block_m, triton.next_power_of_2(group))
    num_tiles = num_tokens // (block_m // group) + num_rows
    _prefill_kernel[(num_tiles * spec.num_kv_heads,)](
        *(strided(query), turning),
        *(None if heads is None else strided(heads) for heads in (key, value)),
        *(None if heads is None else _describe(heads, tiles.block_n) for heads in (key, value)),
        paged(cache),
        *(metadata.query_start[rows], metadata.kv_lens[rows], block_tables, block_tables.stride(0)),
        *(result, scoring(spec), num_rows, num_tiles),
        num_kv_heads=spec.num_kv_heads,
        group=group,
        head_dim=head_dim,
        tokens_per_block=cache[0].shape[1],
        window=spec.sliding_window or 0,
        cap=soft_cap_base2(spec),
        operands=triton_type(operands),
        has_history=has_history,
        block_m=block_m,
        block_n=tiles.block_n,
        block_d=max(16, triton.next_power_of_2(head_dim)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.max_registers,
    )
