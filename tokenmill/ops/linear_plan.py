"""Which kernel multiplies a few rows with a weight on a GPU, and its block sizes. Pure arithmetic: no torch, no triton.

`matvec` and `small_batch` are the kernels of `ops.triton.linear`; `library` is the vendor's product. The numbers were
found by `python -m benchmarks.gpu.tune_linear` on an H100 (docs/log.md, 2026-11-22): for each type and number of rows
one choice of blocks was within 4 % of the best for every layer of an 8B model. Called by `ops.linear` and `ops.fp8`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

BLOCK_OUT = 64
"""Output features of a program of `small_batch`."""
MAX_SPLITS = 8
MIN_PROGRAMS = 96
"""Fewer programs than this leave too much of the device idle: input features are split until there are as many."""
MIN_BLOCKS_PER_SPLIT = 4
MATVEC_ELEMENTS_PER_WARP = 2048


class StreamPlan(NamedTuple):
    """How a product of a few rows is computed.

    Args:
        kernel: what computes it.
        block_out, block_in: output and input features that a program holds at a time.
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


class SmallBatchBlocks(NamedTuple):
    """Blocks of `small_batch` up to a number of rows, for outputs up to a number of features."""

    max_rows: int
    block_in: int
    num_stages: int
    max_out_features: int = 2**31


SMALL_BATCH_16BIT = (SmallBatchBlocks(32, 128, 6), SmallBatchBlocks(64, 128, 4))
SMALL_BATCH_FP8 = (
    SmallBatchBlocks(32, 256, 6),
    SmallBatchBlocks(64, 256, 4),
    SmallBatchBlocks(128, 256, 4, max_out_features=8192),
)
"""Both operands float8. Wide outputs of more than 64 rows are the library's: it shares their rows' reads better."""


@lru_cache(maxsize=4096)
def matvec_plan(out_features: int, in_features: int, weight_bytes: int) -> StreamPlan:
    """The plan for one row of bfloat16 or float16 and a weight [O, I] of `weight_bytes` an element."""
    largest = 2048 if weight_bytes > 1 else 1024
    even = [size for size in (largest, largest // 2, largest // 4) if in_features % size == 0]
    block_in = even[0] if even else min(largest, _power_of_two_from(in_features))
    block_out = 4
    while block_out > 1 and out_features // block_out < 8 * MIN_PROGRAMS:
        block_out //= 2
    num_warps = max(1, block_out * block_in // MATVEC_ELEMENTS_PER_WARP)
    return StreamPlan("matvec", block_out, block_in, num_warps)


@lru_cache(maxsize=4096)
def small_batch_plan(num_rows: int, out_features: int, in_features: int, weight_bytes: int) -> StreamPlan:
    """The plan for some rows and a weight [O, I] of their type, `weight_bytes` an element."""
    for blocks in SMALL_BATCH_FP8 if weight_bytes == 1 else SMALL_BATCH_16BIT:
        if 0 < num_rows <= blocks.max_rows and out_features <= blocks.max_out_features:
            num_splits = _num_splits(-(-out_features // BLOCK_OUT), -(-in_features // blocks.block_in))
            return StreamPlan("small_batch", BLOCK_OUT, blocks.block_in, 4, blocks.num_stages, num_splits)
    return StreamPlan("library")


def _num_splits(num_tiles: int, num_blocks: int) -> int:
    """A power of two: programs enough to occupy the device, but some blocks of input features for each."""
    num_splits = 1
    while (
        num_splits < MAX_SPLITS
        and num_tiles * num_splits < MIN_PROGRAMS
        and num_blocks // (2 * num_splits) >= MIN_BLOCKS_PER_SPLIT
    ):
        num_splits *= 2
    return num_splits


def _power_of_two_from(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
