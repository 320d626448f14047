"""Attention of prompts without history on Hopper, all in float8: it multiplies while it computes the softmax.

A program takes a tile of queries as in `triton_prefill.py`. While it weighs one tile of keys, the products with the
next one and the sum of values of the one before are under way; Triton's own loops wait for each product, so this is
Gluon, where copies and waits are written out; it has no interpreter. Called by `triton.py`.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tokenmill.attention.base import AttentionMetadata, AttentionSpec
from tokenmill.attention.triton_common import Result, Turning, scoring

HEAD_DIM = 128
BLOCK_M = 64  # queries times heads; three programs of four warps share a multiprocessor
BLOCK_N = 64
NUM_STAGES = 4
NUM_WARPS = 4
ALIGNMENT = 16  # bytes, so tokens: anywhere else the bulk copy engine refuses to begin (an illegal instruction)
LIFT = 8.0  # probabilities are multiplied by 2**8, so that small ones are float8 numbers too
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # newer versions of triton renamed it


@gluon.jit
def _find_tile(
    query_start: gl.tensor, tile: gl.tensor, num_rows: gl.tensor, queries_per_tile: gl.constexpr
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """First token of the row that a tile belongs to, the token behind its last, and the tile's first token.

    Tiles begin at multiples of their length: the first one of a row may begin with tokens of the row before. Row r
    has the tiles from `first token // queries_per_tile + r` on, but for those before the step.
    """
    before = gl.load(query_start) // queries_per_tile
    low = num_rows * 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        is_later = gl.load(query_start + middle) // queries_per_tile - before + middle <= tile
        low = gl.where(is_later, middle, low)
        high = gl.where(is_later, high, middle)
    return gl.load(query_start + low), gl.load(query_start + low + 1), (tile - low + before) * queries_per_tile


@gluon.jit
def _load_queries(
    query: gl.tensor, cos: gl.tensor, signed_sin: gl.tensor, rows: gl.tensor, tokens: gl.tensor, is_query: gl.tensor,
    head_dim: gl.constexpr, layout: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:  # fmt: skip
    """[block_m, head_dim] float8, turned, and what they are multiples of, [block_m]; see `load_float8_queries`."""
    half: gl.constexpr = head_dim // 2
    pairs = gl.arange(0, half, gl.SliceLayout(0, layout))[None, :]
    mask = is_query[:, None]
    places = query + rows[:, None] + pairs
    first = gl.load(places, mask=mask, other=0.0).to(gl.float32)
    second = gl.load(places + half, mask=mask, other=0.0).to(gl.float32)
    if cos is not None:
        angles = tokens[:, None] * head_dim + pairs
        cosines = gl.load(cos + angles, mask=mask, other=0.0)
        sines = gl.load(signed_sin + half + angles, mask=mask, other=0.0)
        rounded: gl.constexpr = query.dtype.element_ty
        turned = (first * cosines - second * sines).to(rounded).to(gl.float32)
        second = (second * cosines + first * sines).to(rounded).to(gl.float32)
        first = turned
    largest = gl.max(gl.maximum(gl.abs(first), gl.abs(second)), 1)
    scales = gl.where(largest > 0.0, largest * (1.0 / 448.0), 1.0)
    inverse = (1.0 / scales)[:, None]
    both = gl.join(first * inverse, second * inverse).to(gl.float8e4nv)
    return gl.reshape(gl.permute(both, [0, 2, 1]), [rows.shape[0], head_dim]), scales


@gluon.jit
def _weigh(
    products: gl.tensor, visible: gl.tensor, maximum: gl.tensor, total: gl.tensor, factor: gl.tensor,
    lift: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:  # fmt: skip
    """`softmax_step`: probabilities, factor on what was summed before, new maximum, new total."""
    if visible is not None:
        products = gl.where(visible, products, float("-inf"))
    new_maximum = gl.maximum(maximum, gl.max(products, 1) * factor - lift)
    weights = gl.exp2(products * factor[:, None] - new_maximum[:, None])
    decay = gl.exp2(maximum - new_maximum)
    return weights, decay, new_maximum, total * decay + gl.sum(weights, 1)


@gluon.jit
def _store(
    values: gl.tensor, total: gl.tensor, output: gl.tensor, rows: gl.tensor, is_query: gl.tensor,
    value_scale: gl.tensor, head_dim: gl.constexpr, layout: gl.constexpr,
) -> None:  # fmt: skip
    """End the softmax and store."""
    values = values * (value_scale / total)[:, None]
    values = gl.convert_layout(values.to(output.dtype.element_ty), layout)
    columns = gl.arange(0, head_dim, gl.SliceLayout(0, layout))
    gl.store(output + rows[:, None] + columns[None, :], values, mask=is_query[:, None])


@gluon.jit
def _fetch(
    stream: gl.tuple, number: gl.tensor, of_keys: gl.constexpr, block_n: gl.constexpr, num_stages: gl.constexpr
) -> None:
    """Begin to copy the keys or the values of the `number`-th tile, if there is one."""
    key_tiles, value_tiles, keys, values, key_bars, value_bars, base, column, diagonal = stream
    slot, token, is_wanted = number % num_stages, base + (diagonal - number) * block_n, number <= diagonal
    if of_keys:
        bar = key_bars.index(slot)
        mbarrier.expect(bar, key_tiles.block_type.nbytes, pred=is_wanted)
        tma.async_copy_global_to_shared(key_tiles, [token, column], bar, keys.index(slot), pred=is_wanted)
    else:
        bar = value_bars.index(slot)
        mbarrier.expect(bar, value_tiles.block_type.nbytes, pred=is_wanted)
        tma.async_copy_global_to_shared(value_tiles, [column, token], bar, values.index(slot), pred=is_wanted)


@gluon.jit
def _multiply_keys(
    stream: gl.tuple, q: gl.shared_memory_descriptor, number: gl.tensor, nothing: gl.tensor,
    num_stages: gl.constexpr, is_async: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Products with the `number`-th tile; what they are when there is no such tile is nobody's business."""
    keys, key_bars, diagonal = stream[2], stream[4], stream[8]
    slot = number % num_stages
    mbarrier.wait(key_bars.index(slot), number // num_stages & 1, pred=number <= diagonal)
    return warpgroup_mma(q, keys.index(slot).permute([1, 0]), nothing, use_acc=False, is_async=is_async)


@gluon.jit
def _values_of(stream: gl.tuple, number: gl.tensor, num_stages: gl.constexpr) -> gl.shared_memory_descriptor:
    """Values [block_n, head_dim] of the `number`-th tile."""
    values, value_bars = stream[3], stream[5]
    slot = number % num_stages
    mbarrier.wait(value_bars.index(slot), number // num_stages & 1)
    return values.index(slot).permute([1, 0])


@gluon.jit
def _step(
    stream: gl.tuple, q: gl.shared_memory_descriptor, number: gl.tensor, summed: gl.tensor, products: gl.tensor,
    maximum: gl.tensor, total: gl.tensor, factors: gl.tensor, nothing: gl.tensor,
    lift: gl.constexpr, block_n: gl.constexpr, num_stages: gl.constexpr, sums: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:  # fmt: skip
    """Weigh a tile that all queries see while the next one's products and the last one's values are summed up.

    Both are waited for at once: told apart, the assembler makes each product wait for the one before.
    """
    ahead = _multiply_keys(stream, q, number + 1, nothing, num_stages, True)
    weights, decay, maximum, total = _weigh(products, None, maximum, total, factors, lift)
    sofar, following, weights = warpgroup_mma_wait(num_outstanding=0, deps=(summed, ahead, weights))
    weights = gl.convert_layout(weights.to(gl.float8e4nv), gl.DotOperandLayout(0, sums, 4))
    barrier()  # all have multiplied this tile's keys and the values before, whose places are filled now
    _fetch(stream, number + num_stages, True, block_n, num_stages)
    _fetch(stream, number + num_stages - 1, False, block_n, num_stages)
    sofar = sofar * gl.convert_layout(decay, gl.SliceLayout(1, sums))[:, None]
    summed = warpgroup_mma(weights, _values_of(stream, number, num_stages), sofar, is_async=True)
    return summed, following, maximum, total


@gluon.jit
def _keep(
    values: gl.shared_memory_descriptor, start: gl.tensor, end: gl.tensor, block_n: gl.constexpr,
    num_warps: gl.constexpr,
) -> None:  # fmt: skip
    """Zero a tile's values [block_n, head_dim] outside of tokens `start` to `end`: 0 times anything shall be 0."""
    if (start > 0) | (end < block_n):
        layout: gl.constexpr = gl.BlockedLayout([16, 1], [block_n // 16, 512 // block_n], [1, num_warps], [0, 1])
        tokens = gl.arange(0, block_n, gl.SliceLayout(1, layout))
        tile = values.load(layout)
        barrier()
        values.store(gl.where(((tokens >= start) & (tokens < end))[:, None], tile, 0.0))
        fence_async_shared()
        barrier()


@gluon.jit
def _attend(
    stream: gl.tuple, q: gl.shared_memory_descriptor, factors: gl.tensor, start: gl.tensor, end: gl.tensor,
    first: gl.tensor, group: gl.constexpr, lift: gl.constexpr, block_m: gl.constexpr, block_n: gl.constexpr,
    head_dim: gl.constexpr, num_stages: gl.constexpr, num_warps: gl.constexpr,
    scores: gl.constexpr, sums: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:  # fmt: skip
    """Sum of values [block_m, head_dim] and total [block_m].

    Tile 0 is the one that the queries lie in, the last one that the row begins in; only those need a mask.
    """
    weighed: gl.constexpr = gl.DotOperandLayout(0, sums, 4)
    base, diagonal = stream[6], stream[8]
    nothing = gl.zeros([block_m, block_n], gl.float32, scores)
    products = _multiply_keys(stream, q, 0, nothing, num_stages, False)
    ahead = _multiply_keys(stream, q, 1, nothing, num_stages, True)
    columns = gl.arange(0, block_n, gl.SliceLayout(0, scores))
    keys = base + diagonal * block_n + columns
    queries = first + gl.arange(0, block_m, gl.SliceLayout(1, scores)) // group
    visible = (keys[None, :] <= queries[:, None]) & (keys >= start)[None, :]
    maximum = gl.full([block_m], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
    total = gl.zeros([block_m], gl.float32, gl.SliceLayout(1, scores))
    weights, decay, maximum, total = _weigh(products, visible, maximum, total, factors, lift)
    products, weights = warpgroup_mma_wait(num_outstanding=0, deps=(ahead, weights))
    weights = gl.convert_layout(weights.to(gl.float8e4nv), weighed)
    values = _values_of(stream, 0, num_stages)
    _keep(values, start - base - diagonal * block_n, end - base - diagonal * block_n, block_n, num_warps)
    barrier()
    _fetch(stream, num_stages, True, block_n, num_stages)
    empty = gl.zeros([block_m, head_dim], gl.float32, sums)
    summed = warpgroup_mma(weights, values, empty, use_acc=False, is_async=True)
    for number in range(1, diagonal - 1, 2):  # two at a time: products need not be moved to other registers
        summed, others, maximum, total = _step(
            stream, q, number, summed, products, maximum, total, factors, nothing, lift, block_n, num_stages, sums
        )  # fmt: skip
        summed, products, maximum, total = _step(
            stream, q, number + 1, summed, others, maximum, total, factors, nothing, lift, block_n, num_stages, sums
        )  # fmt: skip
    if (diagonal > 1) & (diagonal % 2 == 0):
        summed, products, maximum, total = _step(
            stream, q, diagonal - 1, summed, products, maximum, total, factors, nothing, lift, block_n, num_stages, sums
        )  # fmt: skip
    result = warpgroup_mma_wait(num_outstanding=0, deps=(summed,))
    if diagonal > 0:
        of_row = (base + columns >= start)[None, :]
        weights, decay, maximum, total = _weigh(products, of_row, maximum, total, factors, lift)
        weights = gl.convert_layout(weights.to(gl.float8e4nv), weighed)
        result = result * gl.convert_layout(decay, gl.SliceLayout(1, sums))[:, None]
        values = _values_of(stream, diagonal, num_stages)
        _keep(values, start - base, end - base, block_n, num_warps)
        result = warpgroup_mma(weights, values, result)
    return result, gl.convert_layout(total, gl.SliceLayout(1, sums))


@gluon.jit(do_not_specialize=["num_rows", "num_tiles"], do_not_specialize_on_alignment=["query_start"])
def _prompts_kernel(
    query: gl.tensor, cos: gl.tensor, signed_sin: gl.tensor, key_tiles: gl.tensor, value_tiles: gl.tensor,
    query_start: gl.tensor, output: gl.tensor, factor: float, value_scale: float, token_stride: int, head_stride: int,
    num_rows: int, num_tiles: int,
    num_kv_heads: gl.constexpr, group: gl.constexpr, head_dim: gl.constexpr, alignment: gl.constexpr,
    lift: gl.constexpr, block_m: gl.constexpr, block_n: gl.constexpr, num_stages: gl.constexpr,
    num_warps: gl.constexpr,
) -> None:  # fmt: skip
    """Grid: tiles times key/value heads, late tiles first; `key_tiles` [T, G * D], `value_tiles` [G * D, T]."""
    loaded: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, block_n, 32])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, head_dim, 32])
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([block_m, head_dim], gl.float8e4nv)
    queries_per_tile: gl.constexpr = block_m // group
    kv_head = gl.program_id(0) % num_kv_heads
    tile = num_tiles - 1 - gl.program_id(0) // num_kv_heads
    start, end, first = _find_tile(query_start, tile, num_rows, queries_per_tile)
    if (first >= end) | (start >= end):
        return
    keys = gl.allocate_shared_memory(gl.float8e4nv, [num_stages, block_n, head_dim], key_tiles.layout)
    values = gl.allocate_shared_memory(gl.float8e4nv, [num_stages, head_dim, block_n], value_tiles.layout)
    key_bars = gl.allocate_shared_memory(gl.int64, [num_stages, 1], mbarrier.MBarrierLayout())
    value_bars = gl.allocate_shared_memory(gl.int64, [num_stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(num_stages):
        mbarrier.init(key_bars.index(stage), count=1)
        mbarrier.init(value_bars.index(stage), count=1)
    fence_async_shared()
    base = start // alignment * alignment
    stream = (
        key_tiles, value_tiles, keys, values, key_bars, value_bars, base, kv_head * head_dim, (first - base) // block_n,
    )  # fmt: skip
    for number in gl.static_range(num_stages):
        _fetch(stream, number, True, block_n, num_stages)
        _fetch(stream, number, False, block_n, num_stages)
    lanes = gl.arange(0, block_m, gl.SliceLayout(1, loaded))
    tokens = (first + lanes // group).to(gl.int64)
    rows = tokens * token_stride + (kv_head * group + lanes % group) * head_stride
    is_query = (tokens >= start) & (tokens < end)
    rounded, scales = _load_queries(query, cos, signed_sin, rows, tokens, is_query, head_dim, loaded)
    q = gl.allocate_shared_memory(gl.float8e4nv, [block_m, head_dim], q_layout, rounded)
    fence_async_shared()
    barrier()
    factors = gl.convert_layout(scales, gl.SliceLayout(1, scores)) * factor
    result, total = _attend(
        stream, q, factors, start, end, first, group, lift, block_m, block_n, head_dim, num_stages, num_warps, scores,
        sums,
    )  # fmt: skip
    lanes = gl.arange(0, block_m, gl.SliceLayout(1, stored))
    tokens = (first + lanes // group).to(gl.int64)
    places = (tokens * (num_kv_heads * group) + kv_head * group + lanes % group) * head_dim
    is_query = (tokens >= start) & (tokens < end)
    _store(result, total, output, places, is_query, value_scale, head_dim, stored)


def multiplies_prompts(spec: AttentionSpec, result: Result) -> bool:
    """Whether the kernel can attend so: Llama's shape."""
    return (
        spec.head_dim == HEAD_DIM
        and 16 % (spec.num_heads // spec.num_kv_heads) == 0
        and (spec.sliding_window, spec.soft_cap, result.sinks, result.log_sum_exp) == (None, None, None, None)
    )


def prompts_attention(
    spec: AttentionSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    metadata: AttentionMetadata,
    output: torch.Tensor,
    *,
    rows: slice,
    turning: Turning | None = None,
) -> None:
    """Attend causally over this step's tokens of some neighbouring rows that have no others. Writes no cache.

    Args:
        query: [T, H, D], all tokens of the step, any strides but 1 along D.
        key, value: [T, G, D] float8, of `write_float8_kv`.
        metadata: its `query_start` is read; of `query_lens` upper bounds will do.
        output: [T, H, D], contiguous.
        rows: which rows of the step.
        turning: queries are turned by these angles first.
    """
    num_tokens, num_heads, head_dim = query.shape
    query_lens = metadata.query_lens[rows]
    group = num_heads // spec.num_kv_heads
    num_tiles = min(sum(query_lens), num_tokens) // (BLOCK_M // group) + 1 + len(query_lens)
    key_layout = gl.NVMMASharedLayout.get_default_for([BLOCK_N, head_dim], gl.float8e4nv)
    value_layout = gl.NVMMASharedLayout.get_default_for([head_dim, BLOCK_N], gl.float8e4nv)
    width = spec.num_kv_heads * head_dim
    score = scoring(spec)
    _prompts_kernel[(num_tiles * spec.num_kv_heads,)](
        *(query, *(turning or (None, None))),
        TensorDescriptor(key, [num_tokens, width], [width, 1], [BLOCK_N, head_dim], key_layout),
        TensorDescriptor(value, [width, num_tokens], [value.stride(2), 1], [head_dim, BLOCK_N], value_layout),
        *(metadata.query_start[rows], output, score.factor, score.value_scale, query.stride(0), query.stride(1)),
        *(len(query_lens), num_tiles),
        num_kv_heads=spec.num_kv_heads,
        group=group,
        head_dim=head_dim,
        alignment=max(ALIGNMENT, BLOCK_M // group),
        lift=LIFT,
        block_m=BLOCK_M,
        block_n=BLOCK_N,
        num_stages=NUM_STAGES,
        num_warps=NUM_WARPS,
    )
