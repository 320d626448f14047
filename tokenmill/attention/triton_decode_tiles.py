"""How the decode kernels are cut: tiles and parts of contexts, from what is fixed when a CUDA graph is captured.

`triton.py` asks for them, `triton_decode.py` and `triton_decode_heads.py` launch with them. Found on an H100.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_SPLITS = 64
"""Parts of a row's context at most, where the number is free: more cost more to combine than they gain."""
MAX_SHORT_CONTEXT = 1024
"""Bound of contexts that are not worth the launch that combines parts, where there is a program for half the device."""


class DecodeTiles(NamedTuple):
    """How the decode kernel is cut.

    Args:
        block_n: cached tokens in one step of the loop.
        num_warps: of a program.
        num_stages: steps whose loads are under way at a time.
        programs_per_multiprocessor: what the number of splits aims at.
        max_registers: of a thread; None: what the compiler takes.
        kv_heads: neighbouring key/value heads of a program, a warp each (`triton_decode_heads`); contexts are not cut
            then. None: one head for all warps.
    """

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int
    max_registers: int | None = None
    kv_heads: int | None = None


def decode_tiles(
    head_dim: int, cache_itemsize: int, num_programs: int, max_kv_len: int, num_multiprocessors: int
) -> DecodeTiles:
    """Tiles, found on an H100: small ones, so that many programs have loads under way.

    A program of a float8 cache waits for its own arithmetic more than for memory, so what counts is how many of them
    there are: 6 on a multiprocessor with the registers that the compiler takes, 8 with fewer. The choice is by what
    the last of them leave idle.

    Args:
        head_dim: D.
        cache_itemsize: bytes of a cached number.
        num_programs: rows times key/value heads.
        max_kv_len: upper bound of the rows' cached tokens.
        num_multiprocessors: of the device.
    """
    if cache_itemsize > 1:
        return DecodeTiles(32, 4 if num_programs >= 4 * num_multiprocessors else 2, 3, 2)
    is_split = num_programs >= num_multiprocessors // 2 and max_kv_len > MAX_SHORT_CONTEXT
    tiles = DecodeTiles(32, 2, 3, 4 if is_split else 2)
    slots = 6 * num_multiprocessors, 8 * num_multiprocessors
    usual, many = (_programs_waited_for(num_programs, count, 3 * num_multiprocessors) for count in slots)
    return tiles._replace(max_registers=128) if head_dim == 128 and many < usual else tiles


def _programs_waited_for(num_programs: int, num_slots: int, min_last: int) -> int:
    """Time of programs that run `num_slots` at a time, in times of one: the last ones take as long as `min_last` do."""
    last = num_programs % num_slots
    return num_programs - last + (max(last, min_last) if last else 0)


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
