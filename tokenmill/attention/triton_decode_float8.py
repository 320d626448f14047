"""The part of decode attention that reads a float8 cache. Called by the kernel of `triton_decode.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenmill.attention.triton_common import PagedCache, cache_slots, load_blocks, load_tile, softmax_step
from tokenmill.ops.triton.launch import is_interpreted

IS_INTERPRETED = tl.constexpr(is_interpreted())  # decided when kernels are defined, on import, like this


@triton.jit
def unpack_float8(pairs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """float16 of the low bytes and of the high bytes of int16 `pairs`, which are two float8_e4m3fn each."""
    if IS_INTERPRETED:
        low, high = (pairs & 0xFF).to(tl.uint8), ((pairs >> 8) & 0xFF).to(tl.uint8)
        even = low.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        odd = high.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        even, odd = tl.inline_asm_elementwise(
            """{
                .reg .b32 sorted;
                .reg .b16 even, odd;
                prmt.b32 sorted, $2, $2, 0x3120;
                mov.b32 {even, odd}, sorted;
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
def attend_part_in_pairs(
    query_even: tl.tensor,  # [block_m, block_d / 2] even dimensions
    query_odd: tl.tensor,
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
    block_m: tl.constexpr,
    block_n: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """As `_attend_part`, of a float8 cache, two neighbouring dimensions at a time.

    The matrix units want pairs of tokens side by side, and the instruction that transposes tiles of shared memory moves
    16 bits: numbers of 8 bits would be fetched one by one. So the cache is read as 16-bit integers, transposed like
    them, and taken apart in registers into even and odd dimensions, which are multiplied separately.
    """
    half: tl.constexpr = head_dim // 2
    offsets = tl.arange(0, block_n)
    maximum = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    values_even = tl.zeros([block_m, half], tl.float32)
    values_odd = tl.zeros([block_m, half], tl.float32)
    keys = cache.key_data.to(tl.pointer_type(tl.int16), bitcast=True)  # type: ignore[call-overload]
    values = cache.value_data.to(tl.pointer_type(tl.int16), bitcast=True)  # type: ignore[call-overload]
    blocks = load_blocks(table, start, first_visible, tl.maximum(end, 1), tokens_per_block, block_n)
    for tile in range(start, end, block_n):
        positions = tile + offsets
        inside = (positions >= first_visible) & (positions < end)
        rows = cache_slots(blocks, positions, tokens_per_block) * (num_kv_heads * half) + kv_head * half
        blocks = load_blocks(table, tile + block_n, first_visible, end, tokens_per_block, block_n)
        key_even, key_odd = unpack_float8(load_tile(keys, rows, inside, half, half, True))
        products = tl.dot(query_even, tl.trans(key_even), input_precision="ieee")
        products = tl.dot(query_odd, tl.trans(key_odd), products, input_precision="ieee")
        weights, decay, maximum, total = softmax_step(products, inside[None, :], maximum, total, factor, cap, True)
        weights = weights.to(tl.float16)
        value_even, value_odd = unpack_float8(load_tile(values, rows, inside, half, half, True))
        values_even = tl.dot(weights, value_even, values_even * decay[:, None], input_precision="ieee")
        values_odd = tl.dot(weights, value_odd, values_odd * decay[:, None], input_precision="ieee")
    return tl.join(values_even, values_odd).reshape(block_m, head_dim), maximum, total
