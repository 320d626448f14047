"""Loads the queries of a tile of prompts: turns them (rotary embedding), rounds them, gives them to the products.

Called by the kernel of `triton_prefill.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenmill.attention.triton_common import StridedHeads, Turning, load_tile, to_float8, turned_halves


@triton.jit
def load_queries(
    heads: StridedHeads,
    turning: Turning | None,
    rows: tl.tensor,  # [block_m] offset of each query
    tokens: tl.tensor,  # [block_m]
    is_query: tl.tensor,  # [block_m]
    output: tl.tensor,  # pointer
    output_rows: tl.tensor,  # [block_m] offset of each query's result
    operands: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
) -> tl.tensor:
    """[block_m, block_d] queries as operands of products; zero where not `is_query`.

    What has just been loaded the compiler gives to the products in shared memory. What comes from arithmetic it holds
    in registers, and two programs on a multiprocessor have none to spare. So queries that are turned or converted pass
    through the place of this program's results, which nobody reads before they are there.
    """
    fits: tl.constexpr = output.dtype.element_ty.primitive_bitwidth == operands.primitive_bitwidth
    place_type: tl.constexpr = operands if fits else output.dtype.element_ty
    place = output.to(tl.pointer_type(place_type), bitcast=True)
    if turning is not None:
        half: tl.constexpr = head_dim // 2
        pairs = tl.arange(0, block_d // 2)[None, :]
        is_pair = is_query[:, None] & (pairs < half)
        first, second = turned_halves(heads, turning, rows, tokens, is_query, head_dim, block_d)
        tl.store(place + output_rows[:, None] + pairs, first, mask=is_pair)
        tl.store(place + output_rows[:, None] + half + pairs, second, mask=is_pair)
        tl.debug_barrier()
        tile = load_tile(place, output_rows, is_query, head_dim, block_d, True)
    else:
        tile = load_tile(heads.data, rows, is_query, head_dim, block_d, True)
        if fits and tile.dtype != operands:
            dims = tl.arange(0, block_d)
            is_element = is_query[:, None] & (dims < head_dim)[None, :]
            tl.store(place + output_rows[:, None] + dims[None, :], tile.to(operands), mask=is_element)
            tl.debug_barrier()
            tile = load_tile(place, output_rows, is_query, head_dim, block_d, True)
    return tile.to(operands)


@triton.jit
def load_float8_queries(
    heads: StridedHeads,
    turning: Turning | None,
    rows: tl.tensor,  # [block_m] offset of each query
    tokens: tl.tensor,  # [block_m]
    is_query: tl.tensor,  # [block_m]
    output: tl.tensor,  # pointer, of 16 bits a number
    output_rows: tl.tensor,  # [block_m] offset of each query's result
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """[block_m, block_d] queries in float8 and their scales [block_m]: the largest number of a query becomes 448.

    They pass through the place of the results for the reason given in `load_queries`.
    """
    half: tl.constexpr = head_dim // 2
    pairs = tl.arange(0, block_d // 2)[None, :]
    is_pair = is_query[:, None] & (pairs < half)
    first, second = turned_halves(heads, turning, rows, tokens, is_query, head_dim, block_d)
    first, second = first.to(tl.float32), second.to(tl.float32)
    largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1)
    scales = tl.where(largest > 0.0, largest * (1.0 / 448.0), 1.0)
    inverse = (1.0 / scales)[:, None]
    place = output.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    place_rows = output_rows * 2
    tl.store(place + place_rows[:, None] + pairs, to_float8(first * inverse), mask=is_pair)
    tl.store(place + place_rows[:, None] + half + pairs, to_float8(second * inverse), mask=is_pair)
    tl.debug_barrier()
    return load_tile(place, place_rows, is_query, head_dim, block_d, True), scales
