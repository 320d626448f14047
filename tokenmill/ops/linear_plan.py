"""Which kernel multiplies a few rows with a weight on a GPU, and its block sizes. Pure arithmetic: no torch, no triton.

`matvec` is the product of `ops.triton.row_product`, `small_batch` that of `ops.triton.linear`, `library` the vendor's.
The numbers were found by `python -m benchmarks.gpu.tune_linear` on an H100 (docs/log.md, 2026-11-22): one choice of
blocks for each type and number of rows is good for nearly every layer of an 8B model, so there are rules and no table
of shapes. Called by `ops.linear`, `ops.fp8` and `ops.row_product`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Literal, NamedTuple

MAX_SPLITS = 8
MIN_PROGRAMS = 96
"""Fewer programs than this leave too much of the device idle: input features are split until there are as many."""
MIN_BLOCKS_PER_SPLIT = 4
MATVEC_BLOCK_OUT = 4
MATVEC_BLOCK_IN = 2048
MATVEC_ELEMENTS_PER_WARP = 2048
MATVEC_ELEMENTS_PER_WARP_OF_LONG_ROWS = 4096
MIN_MATVEC_PROGRAMS = 768
"""Narrower outputs are cut into smaller blocks of features."""
MAX_WALKED_FEATURES = 8192
"""Rows up to this length are held in registers, if that leaves no more than a quarter of a power of two idle."""
MAX_WALKED_OUTPUT = 65536
"""Of wider outputs (a head's) the programs that are not resident at first would run alone at the end."""
ELEMENTS_PER_WALKING_WARP = 512
WALKING_WARPS_PER_MULTIPROCESSOR: Mapping[int, int] = MappingProxyType({1: 32, 2: 48})
WALKING_BLOCK_OUT: Mapping[int, int] = MappingProxyType({1: 4, 2: 2})
"""By bytes of a weight."""
MIN_BLOCK_ROWS = 16


class StreamPlan(NamedTuple):
    """How a product of a few rows is computed.

    Args:
        kernel: what computes it.
        block_out, block_in: output and input features that a program holds at a time.
        block_rows: rows that a program computes (`small_batch`), a power of two.
        programs_per_multiprocessor: programs that walk over all output features and hold the whole row (`matvec`);
            0: each block of output features has its program, which walks over the row.
        num_warps: warps of a program.
        num_stages: blocks of input features in flight (`small_batch`).
        num_splits: programs that share the input features of one block of output features (`small_batch`).
    """

    kernel: Literal["matvec", "small_batch", "library"]
    block_out: int = 0
    block_in: int = 0
    num_warps: int = 4
    num_stages: int = 1
    num_splits: int = 1
    block_rows: int = 1
    programs_per_multiprocessor: int = 0


class SmallBatchBlocks(NamedTuple):
    """Blocks of `small_batch` up to a number of rows, for some numbers of output and input features."""

    max_rows: int
    block_in: int
    num_stages: int
    block_out: int = 64
    num_warps: int = 4
    max_block_rows: int = 128
    min_out_features: int = 0
    max_out_features: int = 2**31
    max_in_features: int = 2**31
    min_programs: int = MIN_PROGRAMS


def _short_and_narrow(
    max_rows: int, block_in: int, num_stages: int, *, block_out: int = 64, num_warps: int = 4
) -> SmallBatchBlocks:
    """For 4,097 to 5,120 features of at most 2,048: over so soon that adding up splits costs more than it gains."""
    return SmallBatchBlocks(
        max_rows, block_in, num_stages, block_out, num_warps,
        min_out_features=4097, max_out_features=5120, max_in_features=2048, min_programs=1,
    )  # fmt: skip


SMALL_BATCH_16BIT = (
    SmallBatchBlocks(32, 128, 6),
    SmallBatchBlocks(64, 128, 4),
)
SMALL_BATCH_FP8 = (
    _short_and_narrow(32, 256, 6),
    _short_and_narrow(64, 128, 8),
    _short_and_narrow(128, 128, 6),
    _short_and_narrow(256, 128, 6, block_out=128, num_warps=8),
    SmallBatchBlocks(32, 256, 6),
    SmallBatchBlocks(64, 256, 8, max_block_rows=16, max_out_features=2048),
    SmallBatchBlocks(64, 256, 4),
    SmallBatchBlocks(128, 256, 6, max_block_rows=32, max_out_features=2048),
    SmallBatchBlocks(128, 256, 6, max_block_rows=64, max_out_features=5120),
    SmallBatchBlocks(128, 256, 4, max_out_features=8192),
    SmallBatchBlocks(256, 256, 4, max_block_rows=64, max_out_features=2048),
    SmallBatchBlocks(256, 128, 4, max_out_features=5120, max_in_features=2048),
    SmallBatchBlocks(256, 256, 4, max_out_features=5120),
)
"""Both operands float8; the first line that fits counts. What none covers is the library's: of many rows it shares the
reads better, but where the output is narrow it leaves most of the device idle.
"""
MAX_COUNTED_ROW_BLOCKS = 4
"""Blocks of rows that counters are made for, with the smallest blocks of output features."""


@lru_cache(maxsize=4096)
def matvec_plan(out_features: int, in_features: int, weight_bytes: int) -> StreamPlan:
    """The plan for one row of bfloat16 or float16 and a weight [O, I] of `weight_bytes` an element.

    Programs that walk over the features prepare the row (its norm, say) once for all of them; a row too long to be held
    is walked over, with a program for each block of features.
    """
    whole_row = _power_of_two_from(in_features)
    is_long = whole_row > MAX_WALKED_FEATURES
    is_full = 3 * whole_row <= 4 * in_features
    walks_features = is_full and not is_long and out_features <= MAX_WALKED_OUTPUT and weight_bytes <= 2
    block_out = WALKING_BLOCK_OUT[weight_bytes] if walks_features else MATVEC_BLOCK_OUT
    while block_out > 1 and out_features // block_out < MIN_MATVEC_PROGRAMS:
        block_out //= 2
    if walks_features:
        num_warps = max(1, whole_row // ELEMENTS_PER_WALKING_WARP)
        programs = max(1, WALKING_WARPS_PER_MULTIPROCESSOR[weight_bytes] // num_warps)
        return StreamPlan("matvec", block_out, whole_row, num_warps, programs_per_multiprocessor=programs)
    block_in = min(MATVEC_BLOCK_IN, whole_row)
    while in_features % block_in and block_in > 512 and in_features % 512 == 0:
        block_in //= 2
    per_warp = MATVEC_ELEMENTS_PER_WARP_OF_LONG_ROWS if is_long else MATVEC_ELEMENTS_PER_WARP
    return StreamPlan("matvec", block_out, block_in, max(1, block_out * block_in // per_warp))


@lru_cache(maxsize=4096)
def small_batch_plan(num_rows: int, out_features: int, in_features: int, weight_bytes: int) -> StreamPlan:
    """The plan for some rows and a weight [O, I] of their type, `weight_bytes` an element."""
    for blocks in SMALL_BATCH_FP8 if weight_bytes == 1 else SMALL_BATCH_16BIT:
        is_within = blocks.min_out_features <= out_features <= blocks.max_out_features
        is_within &= in_features <= blocks.max_in_features
        if 0 < num_rows <= blocks.max_rows and is_within:
            block_rows = min(blocks.max_block_rows, max(MIN_BLOCK_ROWS, _power_of_two_from(num_rows)))
            num_blocks = -(-out_features // blocks.block_out) * -(-num_rows // block_rows)
            return StreamPlan(
                "small_batch",
                blocks.block_out,
                blocks.block_in,
                blocks.num_warps,
                blocks.num_stages,
                num_splits_for(num_blocks, -(-in_features // blocks.block_in), blocks.min_programs),
                block_rows,
            )
    return StreamPlan("library")


def num_splits_for(num_blocks: int, num_blocks_in: int, min_programs: int = MIN_PROGRAMS) -> int:
    """A power of two, for blocks of the result and of input features: programs enough, but some work for each."""
    num_splits = 1
    while (
        num_splits < MAX_SPLITS
        and num_blocks * num_splits < min_programs
        and num_blocks_in // (2 * num_splits) >= MIN_BLOCKS_PER_SPLIT
    ):
        num_splits *= 2
    return num_splits


class InvariantPlan(NamedTuple):
    """How a product is computed whose rows shall not depend on how many there are.

    Args:
        block_out, block_rows, block_in: output features, rows, and input features at a time of a program.
        num_warps, num_stages: of a program.
        num_splits: parts of the input features, each summed by itself, whatever the number of rows.
        split_size: input features of a part.
        splits_programs: whether each part has programs of its own; else one program goes through them all.
        group_rows: blocks of rows that neighbouring programs share weights over.
    """

    block_out: int
    block_rows: int
    block_in: int
    num_warps: int
    num_stages: int
    num_splits: int
    split_size: int
    splits_programs: bool
    group_rows: int = 1


INVARIANT_FEATURES = 64
"""Output features of a program of few rows; splits are chosen for them."""
INVARIANT_PROGRAMS = 200
"""Programs of few rows: one and a half for each multiprocessor, which holds one at a time."""
MAX_INVARIANT_STREAM_ROWS = 128
"""Rows up to which a program reads weights that nobody else needs: narrow tiles, a program for each split."""


@lru_cache(maxsize=4096)
def invariant_plan(num_rows: int, out_features: int, in_features: int, weight_bytes: int) -> InvariantPlan:
    """The plan for some rows and a weight [O, I] of their type, `weight_bytes` an element.

    Splits, and with them the order of all sums, depend on the weight alone.
    """
    block_in = 256 // weight_bytes
    num_blocks_in = -(-in_features // block_in)
    num_splits = num_splits_for(-(-out_features // INVARIANT_FEATURES), num_blocks_in, INVARIANT_PROGRAMS)
    split_size = -(-num_blocks_in // num_splits) * block_in
    if num_rows <= MAX_INVARIANT_STREAM_ROWS:
        block_rows = min(128, max(MIN_BLOCK_ROWS, _power_of_two_from(num_rows)))
        num_stages = 6 if block_rows <= 32 else 4 if block_rows <= 64 else 3
        return InvariantPlan(
            INVARIANT_FEATURES, block_rows, block_in, 4, num_stages, num_splits, split_size, num_splits > 1
        )
    return InvariantPlan(128, 128, 128 // weight_bytes, 8, 4, num_splits, split_size, False, group_rows=8)


def num_arrivals(out_features: int) -> int:
    """Counters that the products with a weight of so many output features need."""
    smallest = min(blocks.block_out for blocks in (*SMALL_BATCH_16BIT, *SMALL_BATCH_FP8))
    return MAX_COUNTED_ROW_BLOCKS * -(-out_features // smallest)


def _power_of_two_from(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
