"""How the decode kernels are cut: tiles and parts of contexts, from what is fixed when a CUDA graph is captured.

`triton.py` asks for them, `triton_decode.py` and `triton_decode_heads.py` launch with them. Found on an H100.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_SPLITS = 64
"""Parts of a row's context at most, where the number is free: more cost more to combine than they gain."""
MAX_SHORT_CONTEXT = 1024
"""Bound of contexts that are not worth the launch that combines parts, where there is a program for half the device."""
MIN_PAIRS = {1: 1.4, 2: 1.9}
"""Pairs of a row's key/value heads for each multiprocessor from which on programs take pairs, by bytes of a number."""


WHOLE_ROWS = (1.9, 2.0)
"""Rows for each multiprocessor where programs take whole rows of four key/value heads: there is room for two, and so
many fill all places once."""


class DecodeTiles(NamedTuple):
    """How the decode kernel is cut.

    Args:
        block_n: cached tokens in one step of the loop.
        num_warps: of a program.
        num_stages: steps whose loads are under way at a time.
        programs_per_multiprocessor: what the number of splits aims at.
        kv_heads: neighbouring key/value heads of a program, a warp each (`triton_decode_heads`): contexts are not cut
            then, and a tile lies in one cache block. None: one head for all warps.
    """

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int
    kv_heads: int | None = None


def decode_tiles(
    head_dim: int,
    cache_itemsize: int,
    num_rows: int,
    num_kv_heads: int,
    tokens_per_block: int,
    max_kv_len: int,
    num_multiprocessors: int,
) -> DecodeTiles:
    """Tiles, found on an H100.

    Many rows are read two heads at a time: pieces of memory of 128 bytes reach 82 to 95 % of the bandwidth, those of
    256 all of it. A program that has a whole row can quantize it; with four heads that costs nothing else. With fewer
    rows what counts is how many programs there are.

    Args:
        head_dim: D.
        cache_itemsize: bytes of a cached number.
        num_rows: R.
        num_kv_heads: G.
        tokens_per_block: B.
        max_kv_len: upper bound of the rows' cached tokens.
        num_multiprocessors: of the device.
    """
    if head_dim == 128 and tokens_per_block % 32 == 0 and num_kv_heads % 2 == 0 and cache_itemsize <= 2:
        fills_places = WHOLE_ROWS[0] <= num_rows / num_multiprocessors <= WHOLE_ROWS[1]
        if cache_itemsize == 1 and num_kv_heads == 4 and fills_places:
            return DecodeTiles(32, 4, 3, 1, kv_heads=4)
        pairs = num_rows * num_kv_heads // 2
        if pairs >= MIN_PAIRS[cache_itemsize] * num_multiprocessors:
            return DecodeTiles(32 // cache_itemsize, 2, 3, 1, kv_heads=2)
    num_programs = num_rows * num_kv_heads
    if cache_itemsize > 1:
        return DecodeTiles(32, 4 if num_programs >= 4 * num_multiprocessors else 2, 3, 2)
    is_split = num_programs >= num_multiprocessors // 2 and max_kv_len > MAX_SHORT_CONTEXT
    return DecodeTiles(32, 2, 3, 4 if is_split else 2)


def choose_num_splits(num_programs: int, max_kv_len: int, num_multiprocessors: int, tiles: DecodeTiles) -> int:
    """Parts that each row's context is cut into, from what is fixed when a CUDA graph is captured.

    Args:
        num_programs: rows times key/value heads.
        max_kv_len: upper bound of the rows' cached tokens.
        num_multiprocessors: of the device.
        tiles: of the kernel.
    """
    if tiles.kv_heads is not None:
        return 1
    wanted = (num_multiprocessors * tiles.programs_per_multiprocessor + num_programs // 2) // num_programs
    return max(1, min(wanted, -(-max_kv_len // tiles.block_n), MAX_SPLITS))
