"""The beginning of decode attention of many rows: a row's own queries, key and value, normalized and turned.

Called by `triton_decode_heads.py`. The key and the value go to the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenmill.attention.triton_common import (
    HeadNorms,
    PagedCache,
    Scoring,
    StridedHeads,
    Turning,
    load_angles,
    load_exchanged,
    load_tile,
    to_cached,
    turn,
)
from tokenmill.attention.triton_decode_parts import prefetch_rows


@triton.jit
def tile_offsets(
    block: tl.tensor,
    tile: tl.tensor,
    first_head: tl.tensor,
    num_kv_heads: tl.constexpr,
    tokens_per_block: tl.constexpr,
    num_heads: tl.constexpr,
    block_n: tl.constexpr,
    width: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where the tile begins in the cache, and from there its numbers [num_heads, block_n, width], as in any tile."""
    begin = (block.to(tl.int64) * tokens_per_block + tile % tokens_per_block) * num_kv_heads + first_head
    heads, tokens, dims = tl.arange(0, num_heads), tl.arange(0, block_n), tl.arange(0, width)
    inner = tokens[None, :, None] * (num_kv_heads * width) + heads[:, None, None] * width + dims[None, None, :]
    return begin * width, inner


@triton.jit
def _prefetch_tile(
    cache: PagedCache,
    block: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    first_head: tl.tensor,
    num_kv_heads: tl.constexpr,
    tokens_per_block: tl.constexpr,
    num_heads: tl.constexpr,
    block_n: tl.constexpr,
    head_dim: tl.constexpr,
) -> None:
    """Ask for the keys and values of the tile at `start` to come to L2."""
    begin, _ = tile_offsets(
        block, start, first_head, num_kv_heads, tokens_per_block, num_heads, block_n, head_dim
    )  # fmt: skip
    tokens = tl.arange(0, block_n)
    rows = begin + tokens * (num_kv_heads * head_dim)
    prefetch_rows(cache.key_data, rows, start + tokens < end, num_heads * head_dim)
    prefetch_rows(cache.value_data, rows, start + tokens < end, num_heads * head_dim)


@triton.jit
def _load_factors(data: tl.tensor, head_dim: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Factors of a norm [head_dim], and with their halves exchanged."""
    dims = tl.arange(0, head_dim)
    return tl.load(data + dims), tl.load(data + (dims + head_dim // 2) % head_dim)


@triton.jit
def _normalized(
    heads: tl.tensor,  # [N, head_dim]
    exchanged: tl.tensor,  # their halves exchanged
    factors: tl.tensor,  # [head_dim]
    exchanged_factors: tl.tensor,
    eps: tl.tensor,
    head_dim: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """RMS norm of each head, rounded as between two ops."""
    numbers = heads.to(tl.float32)
    factor = tl.rsqrt(tl.sum(numbers * numbers, 1) / head_dim + eps)[:, None]
    normalized = numbers * factor * factors.to(tl.float32)[None, :]
    other = exchanged.to(tl.float32) * factor * exchanged_factors.to(tl.float32)[None, :]
    return normalized.to(heads.dtype), other.to(heads.dtype)


@triton.jit
def load_and_write_own(
    query: StridedHeads,
    key: StridedHeads,
    value: StridedHeads,
    turning: Turning | None,
    norms: HeadNorms | None,
    cache: PagedCache,
    block: tl.tensor,  # of the first tile
    slot: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    score: Scoring,
    first_head: tl.tensor,
    num_kv_heads: tl.constexpr,
    num_heads: tl.constexpr,
    group: tl.constexpr,
    block_g: tl.constexpr,
    block_n: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    asks_early: tl.constexpr,
) -> tl.tensor:
    """The row's queries [num_heads * block_g, head_dim]; its key and value go to the cache, where all warps see them.

    All that is needed is asked for before anything is waited for, the first tile of the cache last (`asks_early`).
    """
    lanes = tl.arange(0, num_heads * block_g)
    is_head = lanes % block_g < group
    heads = (first_head + lanes // block_g) * group + lanes % block_g
    query_rows = row * query.token_stride + heads * query.head_stride
    own = first_head + tl.arange(0, num_heads)
    key_rows = row * key.token_stride + own * key.head_stride
    own_key = load_tile(key.data, key_rows, own >= 0, head_dim, head_dim, False)
    own_value = load_tile(
        value.data, row * value.token_stride + own * value.head_stride, own >= 0, head_dim, head_dim, False
    )  # fmt: skip
    q = load_tile(query.data, query_rows, is_head, head_dim, head_dim, True)
    if turning is not None:
        exchanged_key = load_exchanged(key.data, key_rows, own >= 0, head_dim, head_dim)
        exchanged = load_exchanged(query.data, query_rows, is_head, head_dim, head_dim)
        cosines, sines = load_angles(turning, row, head_dim, head_dim)
        if norms is not None:
            key_factors, key_others = _load_factors(norms.key, head_dim)
            factors, others = _load_factors(norms.query, head_dim)
    if asks_early:
        _prefetch_tile(
            cache, block, start, end, first_head, num_kv_heads, tokens_per_block, num_heads, block_n, head_dim
        )  # fmt: skip
    if turning is not None:
        if norms is not None:
            own_key, exchanged_key = _normalized(own_key, exchanged_key, key_factors, key_others, norms.eps, head_dim)
            q, exchanged = _normalized(q, exchanged, factors, others, norms.eps, head_dim)
        own_key = turn(own_key, exchanged_key, cosines, sines)
        q = turn(q, exchanged, cosines, sines)
    places = ((slot * num_kv_heads + own) * head_dim)[:, None] + tl.arange(0, head_dim)[None, :]
    tl.store(cache.key_data + places, to_cached(own_key, score.key_scale, cache.key_data))
    tl.store(cache.value_data + places, to_cached(own_value, score.value_scale, cache.value_data))
    tl.debug_barrier()
    return q
