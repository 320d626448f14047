"""Decode attention of many rows: a program takes several neighbouring key/value heads of a row, each warp one of them.

Called by `triton_decode.py`. The heads of a token lie side by side in the cache, so a program reads long pieces of
memory; a warp has the scores of its head to itself, so it waits for no other but for the tiles to arrive. A row's
context is not cut into parts: there must be enough rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.attention.triton_common import (
    PagedCache,
    Result,
    Scoring,
    StridedHeads,
    Turning,
    cache_slots,
    load_blocks,
    load_turned,
    operand_type,
    paged,
    scores_base2,
    scoring,
    soft_cap_base2,
    softmax_step,
    store_result,
    strided,
    to_cached,
    triton_type,
)
from tokenmill.attention.triton_decode_float8 import IS_INTERPRETED, unpack_float8
from tokenmill.attention.triton_decode_parts import prefetch_rows, visible_range
from tokenmill.attention.triton_decode_tiles import DecodeTiles
from tokenmill.ops.triton.launch import can_overlap


@triton.jit
def _token_offsets(
    blocks: tl.tensor,  # of the tile, see `load_blocks`
    tile: tl.tensor,
    first_head: tl.tensor,
    num_kv_heads: tl.constexpr,
    tokens_per_block: tl.constexpr,
    block_n: tl.constexpr,
    width: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where the numbers of `first_head` begin for the tile, and from there for each of its tokens [N].

    Of a tile in one block the second does not change from tile to tile, which saves arithmetic.
    """
    tokens = tl.arange(0, block_n)
    if tokens_per_block % block_n == 0:
        begin = (blocks.to(tl.int64) * tokens_per_block + tile % tokens_per_block) * num_kv_heads + first_head
        offsets = tokens * (num_kv_heads * width)
    else:
        begin = first_head.to(tl.int64)
        offsets = cache_slots(blocks, tile + tokens, tokens_per_block) * (num_kv_heads * width)
    return begin * width, offsets


@triton.jit
def _load_heads(
    data: tl.tensor,  # pointer
    begin: tl.tensor,
    offsets: tl.tensor,  # [N]
    inside: tl.tensor,  # [N]
    num_heads: tl.constexpr,
    width: tl.constexpr,
) -> tl.tensor:
    """[num_heads, N, width] keys or values of neighbouring heads; zero where not `inside`."""
    heads = tl.arange(0, num_heads) * width
    pointers = data + begin + (offsets[None, :, None] + heads[:, None, None] + tl.arange(0, width)[None, None, :])
    return tl.load(pointers, mask=inside[None, :, None], other=0.0)


@triton.jit
def _bytes_to_float16(numbers: tl.tensor) -> tl.tensor:
    """float16 of float8_e4m3fn that are given as integers; for the interpreter."""
    return (numbers & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def _unpack_in_order(pairs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """float16 of int16 `pairs` [..., half] of two float8_e4m3fn each: of even pairs, and of odd ones, [..., half].

    Unlike `unpack_float8` it leaves the two numbers of a pair side by side, which takes no instruction to sort them.
    """
    if IS_INTERPRETED:
        even, odd = tl.split(pairs.reshape(pairs.shape[0], pairs.shape[1], pairs.shape[2] // 2, 2))
        even = tl.join(_bytes_to_float16(even), _bytes_to_float16(even >> 8)).reshape(pairs.shape)
        odd = tl.join(_bytes_to_float16(odd), _bytes_to_float16(odd >> 8)).reshape(pairs.shape)
    else:
        even, odd = tl.inline_asm_elementwise(
            """{
                .reg .b16 even, odd;
                mov.b32 {even, odd}, $2;
                cvt.rn.f16x2.e4m3x2 $0, even;
                cvt.rn.f16x2.e4m3x2 $1, odd;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return even, odd


@triton.jit
def _split_in_order(
    query: tl.tensor, num_heads: tl.constexpr, block_m: tl.constexpr, head_dim: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The query's dimensions as `_unpack_in_order` leaves those of keys, [num_heads, block_m, head_dim / 2] each."""
    pairs = query.reshape(num_heads, block_m, head_dim // 4, 2, 2)
    even, odd = tl.split(tl.permute(pairs, (0, 1, 2, 4, 3)))
    return even.reshape(num_heads, block_m, head_dim // 2), odd.reshape(num_heads, block_m, head_dim // 2)


@triton.jit
def _attend_float8(
    query: tl.tensor,  # [P, block_m, head_dim]
    own_value: tl.tensor,  # [P, head_dim]
    maximum: tl.tensor,  # [P, block_m]
    cache: PagedCache,
    table: tl.tensor,
    first_head: tl.tensor,
    first_visible: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    factor: tl.tensor,
    num_kv_heads: tl.constexpr,
    tokens_per_block: tl.constexpr,
    cap: tl.constexpr,
    num_heads: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    head_dim: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    half: tl.constexpr = head_dim // 2
    query_even, query_odd = _split_in_order(query, num_heads, block_m, head_dim)
    own_even, own_odd = tl.split(own_value.to(tl.float32).reshape(num_heads, half, 2))
    values_even = tl.broadcast_to(own_even[:, None, :], num_heads, block_m, half)
    values_odd = tl.broadcast_to(own_odd[:, None, :], num_heads, block_m, half)
    total = tl.full([num_heads, block_m], 1.0, tl.float32)
    keys = cache.key_data.to(tl.pointer_type(tl.int16), bitcast=True)  # type: ignore[call-overload]
    values = cache.value_data.to(tl.pointer_type(tl.int16), bitcast=True)  # type: ignore[call-overload]
    offsets = tl.arange(0, block_n)
    blocks = load_blocks(table, start, first_visible, tl.maximum(end, 1), tokens_per_block, block_n)
    for tile in range(start, end, block_n):
        positions = tile + offsets
        inside = (positions >= first_visible) & (positions < end)
        begin, places = _token_offsets(blocks, tile, first_head, num_kv_heads, tokens_per_block, block_n, half)
        blocks = load_blocks(table, tile + block_n, first_visible, end, tokens_per_block, block_n)
        key_even, key_odd = _unpack_in_order(_load_heads(keys, begin, places, inside, num_heads, half))
        products = tl.dot(query_even, tl.permute(key_even, (0, 2, 1)), input_precision="ieee")
        products = tl.dot(query_odd, tl.permute(key_odd, (0, 2, 1)), products, input_precision="ieee")
        weights, decay, maximum, total = softmax_step(
            products, inside[None, None, :], maximum, total, factor, cap, True, False
        )
        weights = weights.to(tl.float16)
        value_even, value_odd = unpack_float8(_load_heads(values, begin, places, inside, num_heads, half))
        values_even = tl.dot(weights, value_even, values_even * decay[:, :, None], input_precision="ieee")
        values_odd = tl.dot(weights, value_odd, values_odd * decay[:, :, None], input_precision="ieee")
    return tl.join(values_even, values_odd).reshape(num_heads, block_m, head_dim), maximum, total


@triton.jit
def _attend(
    query: tl.tensor,  # [P, block_m, head_dim]
    own_value: tl.tensor,  # [P, head_dim]
    maximum: tl.tensor,  # [P, block_m]
    cache: PagedCache,
    table: tl.tensor,
    first_head: tl.tensor,
    first_visible: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    factor: tl.tensor,
    num_kv_heads: tl.constexpr,
    tokens_per_block: tl.constexpr,
    cap: tl.constexpr,
    operands: tl.constexpr,
    num_heads: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    head_dim: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    total = tl.full([num_heads, block_m], 1.0, tl.float32)
    sums = tl.broadcast_to(own_value.to(tl.float32)[:, None, :], num_heads, block_m, head_dim)
    offsets = tl.arange(0, block_n)
    blocks = load_blocks(table, start, first_visible, tl.maximum(end, 1), tokens_per_block, block_n)
    for tile in range(start, end, block_n):
        positions = tile + offsets
        inside = (positions >= first_visible) & (positions < end)
        begin, places = _token_offsets(blocks, tile, first_head, num_kv_heads, tokens_per_block, block_n, head_dim)
        blocks = load_blocks(table, tile + block_n, first_visible, end, tokens_per_block, block_n)
        key = _load_heads(cache.key_data, begin, places, inside, num_heads, head_dim)
        products = tl.dot(query, tl.permute(key.to(operands), (0, 2, 1)), input_precision="ieee")
        weights, decay, maximum, total = softmax_step(
            products, inside[None, None, :], maximum, total, factor, cap, True, False
        )
        value = _load_heads(cache.value_data, begin, places, inside, num_heads, head_dim)
        sums = tl.dot(weights.to(operands), value.to(operands), sums * decay[:, :, None], input_precision="ieee")
    return sums, maximum, total


@triton.jit
def _ask_for_tiles(
    cache: PagedCache,
    table: tl.tensor,  # pointer
    table_stride: tl.tensor,
    first_head: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    num_kv_heads: tl.constexpr,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    block_n: tl.constexpr,
    num_tiles: tl.constexpr,
) -> None:
    """Ask for the first tiles to come to L2. The table is read without waiting for `end`."""
    tokens = tl.arange(0, block_n)
    for step in tl.static_range(num_tiles):
        tile = start + step * block_n
        block = tl.load(table + tl.minimum(tile // tokens_per_block, table_stride - 1))
        block = tl.where(tile < end, block, 0)
        begin, offsets = _token_offsets(block, tile, first_head, num_kv_heads, tokens_per_block, block_n, head_dim)
        prefetch_rows(cache.key_data + begin, offsets, tile + tokens < end, num_heads * head_dim)
        prefetch_rows(cache.value_data + begin, offsets, tile + tokens < end, num_heads * head_dim)


@triton.jit(
    do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["kv_lens", "block_tables", "slot_mapping"]
)
def _decode_heads_kernel(
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
    score: Scoring,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    window: tl.constexpr,
    cap: tl.constexpr,
    operands: tl.constexpr,
    num_heads: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    overlaps: tl.constexpr,
    ahead: tl.constexpr,
) -> None:
    """Grid: key/value heads in groups of `num_heads`, rows."""
    if overlaps:
        gdc_launch_dependents()
    first_head, row = tl.program_id(0) * num_heads, tl.program_id(1).to(tl.int64)
    table = block_tables + row * table_stride
    first_visible, first, end = visible_range(tl.load(kv_lens + row), window, block_n)
    if overlaps and ahead > 0:
        begin_at = first if window > 0 else 0
        _ask_for_tiles(
            cache,
            table,
            table_stride,
            first_head,
            begin_at,
            end,
            num_kv_heads,
            num_heads,
            head_dim,
            tokens_per_block,
            block_n,
            ahead,
        )
    slot = tl.load(slot_mapping + row)
    lanes = tl.arange(0, num_heads * block_m)
    is_head = lanes % block_m < group
    heads = (first_head + lanes // block_m) * group + lanes % block_m
    q = load_turned(
        query.data, row * query.token_stride + heads * query.head_stride, is_head, turning, row, head_dim, head_dim
    )
    q = q.to(operands).reshape(num_heads, block_m, head_dim)
    own_heads = first_head + tl.arange(0, num_heads)
    everywhere = own_heads >= 0
    own_key = load_turned(
        key.data, row * key.token_stride + own_heads * key.head_stride, everywhere, turning, row, head_dim, head_dim
    )
    own_value = load_turned(
        value.data, row * value.token_stride + own_heads * value.head_stride, everywhere, None, row, head_dim, head_dim
    )
    places = (slot * num_kv_heads + own_heads)[:, None] * head_dim
    places += tl.arange(0, head_dim)[None, :]
    cached_key = to_cached(own_key, score.key_scale, cache.key_data)
    cached_value = to_cached(own_value, score.value_scale, cache.value_data)
    tl.store(cache.key_data + places, cached_key)
    tl.store(cache.value_data + places, cached_value)
    own_products = tl.sum(q.to(tl.float32) * cached_key.to(tl.float32)[:, None, :], 2)
    maximum = scores_base2(own_products, score.factor, cap)
    is_float8: tl.constexpr = cache.key_data.dtype.element_ty == tl.float8e4nv  # type: ignore[attr-defined]
    if is_float8 and operands == tl.float16:
        values, maximum, total = _attend_float8(
            q,
            cached_value,
            maximum,
            cache,
            table,
            first_head,
            first_visible,
            first,
            end,
            score.factor,
            num_kv_heads,
            tokens_per_block,
            cap,
            num_heads,
            block_m,
            block_n,
            head_dim,
        )
    else:
        values, maximum, total = _attend(
            q,
            cached_value,
            maximum,
            cache,
            table,
            first_head,
            first_visible,
            first,
            end,
            score.factor,
            num_kv_heads,
            tokens_per_block,
            cap,
            operands,
            num_heads,
            block_m,
            block_n,
            head_dim,
        )
    lanes_in_all: tl.constexpr = num_heads * block_m
    store_result(
        values.reshape(lanes_in_all, head_dim),
        maximum.reshape(lanes_in_all),
        total.reshape(lanes_in_all),
        row * (num_kv_heads * group) + heads,
        heads,
        is_head,
        result,
        score.value_scale,
        head_dim,
        head_dim,
    )


def decode_attention_of_heads(
    spec: AttentionSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    metadata: AttentionMetadata,
    result: Result,
    *,
    tiles: DecodeTiles,
    turning: Turning | None = None,
    ahead: int = 0,
) -> None:
    """`triton_decode.decode_attention` in one part, with tiles for several key/value heads a program."""
    head_dim, group, num_heads = query.shape[2], spec.num_heads // spec.num_kv_heads, tiles.kv_heads
    assert num_heads is not None and spec.num_kv_heads % num_heads == 0, "programs take as many heads each"
    assert head_dim == triton.next_power_of_2(head_dim), "a head must fill its tile"
    _decode_heads_kernel[(spec.num_kv_heads // num_heads, query.shape[0])](
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
        scoring(spec),
        num_kv_heads=spec.num_kv_heads,
        group=group,
        head_dim=head_dim,
        tokens_per_block=cache[0].shape[1],
        window=spec.sliding_window or 0,
        cap=soft_cap_base2(spec),
        operands=triton_type(operand_type(query.dtype, cache[0].dtype)),
        num_heads=num_heads,
        block_m=max(16, triton.next_power_of_2(group)),
        block_n=tiles.block_n,
        overlaps=can_overlap(query.device),
        ahead=ahead,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.max_registers,
    )
