"""Decode attention of many rows: a program takes several neighbouring key/value heads of a row, each warp one of them.

Called by `triton_decode.py`. The heads of a token lie side by side in the cache, so a program reads long pieces of
memory. A warp has its head's scores to itself: it waits for no other but for tiles to arrive. A row's context is not
cut into parts, so there must be enough rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.attention.triton_common import (
    HeadNorms,
    PagedCache,
    Result,
    Scoring,
    StridedHeads,
    Turning,
    load_blocks,
    operand_type,
    paged,
    scoring,
    soft_cap_base2,
    softmax_step,
    strided,
    triton_type,
)
from tokenmill.attention.triton_decode_float8 import IS_INTERPRETED, unpack_float8
from tokenmill.attention.triton_decode_own import load_and_write_own, tile_offsets
from tokenmill.attention.triton_decode_rows import QuantizedResult, store_heads
from tokenmill.attention.triton_decode_tiles import DecodeTiles
from tokenmill.ops.triton.launch import can_overlap


@triton.jit
def _is_visible(
    tile: tl.tensor, first_visible: tl.tensor, end: tl.tensor, window: tl.constexpr, block_n: tl.constexpr
) -> tl.tensor:
    """[1, block_n]"""
    positions = tile + tl.arange(0, block_n)
    visible = positions < end
    if window > 0:
        visible &= positions >= first_visible
    return visible[None, :]


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
def _for_heads(
    query: tl.tensor,  # [num_heads * block_g, width]
    num_heads: tl.constexpr,
    block_g: tl.constexpr,
    block_m: tl.constexpr,
    width: tl.constexpr,
) -> tl.tensor:
    """[num_heads, block_m, width]: each head's queries, repeated where the matrix units want more."""
    once = query.reshape(num_heads, 1, block_g, width)
    repeated = tl.broadcast_to(once, num_heads, block_m // block_g, block_g, width)
    return repeated.reshape(num_heads, block_m, width)


@triton.jit
def _attend_float8(
    query: tl.tensor,  # [num_heads * block_g, head_dim]
    cache: PagedCache,
    table: tl.tensor,  # pointer
    block: tl.tensor,  # of the first tile
    first_head: tl.tensor,
    first_visible: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    factor: tl.tensor,
    num_kv_heads: tl.constexpr,
    tokens_per_block: tl.constexpr,
    window: tl.constexpr,
    cap: tl.constexpr,
    num_heads: tl.constexpr,
    block_g: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    head_dim: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attend to positions start to end: sums of values [num_heads, block_m, head_dim], maxima and totals.

    Dimensions of queries and keys are multiplied in the order in which `_unpack_in_order` leaves them. Values are
    transposed on their way, so those are taken apart into even and odd dimensions: see `attend_part_in_pairs`.
    """
    half: tl.constexpr = head_dim // 2
    pairs = tl.permute(query.reshape(num_heads * block_g, head_dim // 4, 2, 2), (0, 1, 3, 2))
    even, odd = tl.split(pairs)
    query_even = _for_heads(even.reshape(num_heads * block_g, half), num_heads, block_g, block_m, half)
    query_odd = _for_heads(odd.reshape(num_heads * block_g, half), num_heads, block_g, block_m, half)
    maximum = tl.full([num_heads, block_m], -1e30, tl.float32)
    total = tl.zeros([num_heads, block_m], tl.float32)
    values_even = tl.zeros([num_heads, block_m, half], tl.float32)
    values_odd = tl.zeros([num_heads, block_m, half], tl.float32)
    keys = cache.key_data.to(tl.pointer_type(tl.int16), bitcast=True)  # type: ignore[call-overload]
    values = cache.value_data.to(tl.pointer_type(tl.int16), bitcast=True)  # type: ignore[call-overload]
    for tile in range(start, end, block_n):
        visible = _is_visible(tile, first_visible, end, window, block_n)
        begin, inner = tile_offsets(
            block, tile, first_head, num_kv_heads, tokens_per_block, num_heads, block_n, half
        )  # fmt: skip
        block = load_blocks(table, tile + block_n, first_visible, end, tokens_per_block, block_n)
        key_even, key_odd = _unpack_in_order(tl.load(keys + begin + inner, mask=visible[:, :, None], other=0))
        products = tl.dot(query_even, tl.permute(key_even, (0, 2, 1)), input_precision="ieee")
        products = tl.dot(query_odd, tl.permute(key_odd, (0, 2, 1)), products, input_precision="ieee")
        weights, decay, maximum, total = softmax_step(
            products, visible[:, None, :], maximum, total, factor, cap, True, False
        )  # fmt: skip
        weights = weights.to(tl.float16)
        value_even, value_odd = unpack_float8(tl.load(values + begin + inner, mask=visible[:, :, None], other=0))
        values_even = tl.dot(weights, value_even, values_even * decay[:, :, None], input_precision="ieee")
        values_odd = tl.dot(weights, value_odd, values_odd * decay[:, :, None], input_precision="ieee")
    return tl.join(values_even, values_odd).reshape(num_heads, block_m, head_dim), maximum, total


@triton.jit
def _attend(
    query: tl.tensor,  # [num_heads * block_g, head_dim]
    cache: PagedCache,
    table: tl.tensor,  # pointer
    block: tl.tensor,  # of the first tile
    first_head: tl.tensor,
    first_visible: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    factor: tl.tensor,
    num_kv_heads: tl.constexpr,
    tokens_per_block: tl.constexpr,
    window: tl.constexpr,
    cap: tl.constexpr,
    operands: tl.constexpr,
    num_heads: tl.constexpr,
    block_g: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    head_dim: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """As `_attend_float8`, of a cache of any type."""
    queries = _for_heads(query, num_heads, block_g, block_m, head_dim)
    maximum = tl.full([num_heads, block_m], -1e30, tl.float32)
    total = tl.zeros([num_heads, block_m], tl.float32)
    sums = tl.zeros([num_heads, block_m, head_dim], tl.float32)
    for tile in range(start, end, block_n):
        visible = _is_visible(tile, first_visible, end, window, block_n)
        begin, inner = tile_offsets(
            block, tile, first_head, num_kv_heads, tokens_per_block, num_heads, block_n, head_dim
        )  # fmt: skip
        block = load_blocks(table, tile + block_n, first_visible, end, tokens_per_block, block_n)
        key = tl.load(cache.key_data + begin + inner, mask=visible[:, :, None], other=0.0).to(operands)
        products = tl.dot(queries, tl.permute(key, (0, 2, 1)), input_precision="ieee")
        weights, decay, maximum, total = softmax_step(
            products, visible[:, None, :], maximum, total, factor, cap, True, False
        )  # fmt: skip
        value = tl.load(cache.value_data + begin + inner, mask=visible[:, :, None], other=0.0).to(operands)
        sums = tl.dot(weights.to(operands), value, sums * decay[:, :, None], input_precision="ieee")
    return sums, maximum, total


@triton.jit
def _attend_cached(
    query: tl.tensor,  # [num_heads * block_g, head_dim]
    cache: PagedCache,
    table: tl.tensor,  # pointer
    block: tl.tensor,  # of the first tile
    first_head: tl.tensor,
    first_visible: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    factor: tl.tensor,
    num_kv_heads: tl.constexpr,
    tokens_per_block: tl.constexpr,
    window: tl.constexpr,
    cap: tl.constexpr,
    operands: tl.constexpr,
    num_heads: tl.constexpr,
    block_g: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    head_dim: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """In the way that suits the cache's type."""
    is_float8: tl.constexpr = cache.key_data.dtype.element_ty == tl.float8e4nv  # type: ignore[attr-defined]
    if is_float8 and operands == tl.float16:
        values, maximum, total = _attend_float8(
            query, cache, table, block, first_head, first_visible, start, end, factor, num_kv_heads, tokens_per_block,
            window, cap, num_heads, block_g, block_m, block_n, head_dim,
        )  # fmt: skip
    else:
        values, maximum, total = _attend(
            query, cache, table, block, first_head, first_visible, start, end, factor, num_kv_heads, tokens_per_block,
            window, cap, operands, num_heads, block_g, block_m, block_n, head_dim,
        )  # fmt: skip
    return values, maximum, total


@triton.jit(
    do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["kv_lens", "block_tables", "slot_mapping"]
)
def _decode_heads_kernel(
    query: StridedHeads,
    key: StridedHeads,
    value: StridedHeads,
    turning: Turning | None,
    norms: HeadNorms | None,
    cache: PagedCache,
    kv_lens: tl.tensor,
    block_tables: tl.tensor,
    table_stride: int,
    slot_mapping: tl.tensor,
    result: Result,
    quantized_result: QuantizedResult | None,
    score: Scoring,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    tokens_per_block: tl.constexpr,
    window: tl.constexpr,
    cap: tl.constexpr,
    operands: tl.constexpr,
    num_heads: tl.constexpr,
    block_g: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """Grid: key/value heads in groups of `num_heads`, rows."""
    if overlaps:
        gdc_launch_dependents()
    first_head, row = tl.program_id(0) * num_heads, tl.program_id(1).to(tl.int64)
    end, slot = tl.load(kv_lens + row), tl.load(slot_mapping + row)
    table = block_tables + row * table_stride
    first_visible = tl.maximum(end - window, 0) if window > 0 else end * 0
    start = first_visible // block_n * block_n
    if window > 0:
        block = load_blocks(table, start, first_visible, tl.maximum(end, 1), tokens_per_block, block_n)
    else:
        block = tl.load(table)  # without waiting for the row's length
    q = load_and_write_own(
        query, key, value, turning, norms, cache, block, slot, row, start, end, score, first_head, num_kv_heads,
        num_heads, group, block_g, block_n, head_dim, tokens_per_block, overlaps,
    ).to(operands)  # fmt: skip
    values, maximum, total = _attend_cached(
        q, cache, table, block, first_head, first_visible, start, end, score.factor, num_kv_heads, tokens_per_block,
        window, cap, operands, num_heads, block_g, block_m, block_n, head_dim,
    )  # fmt: skip
    store_heads(
        values, maximum, total, row, first_head, result, quantized_result, score.value_scale, num_kv_heads, group,
        num_heads, block_m, head_dim,
    )  # fmt: skip


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
    norms: HeadNorms | None = None,
    quantized_result: QuantizedResult | None = None,
) -> None:
    """`triton_decode.decode_attention` in one part, with tiles for several key/value heads a program.

    Args:
        spec, query, key, value, cache, metadata, result, tiles, turning: see there.
        norms: queries and keys are normalized before they are turned; None: they are not.
        quantized_result: where the rows go instead of `result`; None: they are not quantized.
    """
    head_dim, group, num_heads = query.shape[2], spec.num_heads // spec.num_kv_heads, tiles.kv_heads
    assert num_heads is not None and spec.num_kv_heads % num_heads == 0, "programs take as many heads each"
    assert tiles.num_warps == num_heads, "a head has a warp"
    assert norms is None or turning is not None, "only heads that are turned are normalized"
    assert quantized_result is None or num_heads == spec.num_kv_heads, "a row is quantized by the program that has it"
    assert head_dim == triton.next_power_of_2(head_dim), "a head must fill its tile"
    assert cache[0].shape[1] % tiles.block_n == 0, "a tile must lie in one block"
    block_g = triton.next_power_of_2(group)
    _decode_heads_kernel[(spec.num_kv_heads // num_heads, query.shape[0])](
        strided(query), strided(key), strided(value), turning, norms, paged(cache), metadata.kv_lens,
        metadata.block_tables, metadata.block_tables.stride(0), metadata.slot_mapping, result, quantized_result,
        scoring(spec),
        num_kv_heads=spec.num_kv_heads,
        group=group,
        head_dim=head_dim,
        tokens_per_block=cache[0].shape[1],
        window=spec.sliding_window or 0,
        cap=soft_cap_base2(spec),
        operands=triton_type(operand_type(query.dtype, cache[0].dtype)),
        num_heads=num_heads,
        block_g=block_g,
        block_m=max(16, block_g),
        block_n=tiles.block_n,
        overlaps=can_overlap(query.device),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
