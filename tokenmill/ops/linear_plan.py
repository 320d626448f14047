"""Which kernel multiplies a few rows with a weight on a GPU, and its block sizes. Pure arithmetic: no torch, no triton.

Called by `ops.linear` and `ops.fp8`. The numbers were found by `python -m benchmarks.gpu.ops --tune` on an H100.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

MAX_STREAMED_ROWS = 64


class StreamPlan(NamedTuple):
    """How a product of a few rows is computed.

    Args:
        kernel: `matvec`, `small_batch` (both in `ops.triton.linear`), or `library`: the vendor's.
        block_out, block_in: output and input features that a program holds at a time.
        num_warps, num_stages: warps of a program, and loads in flight.
        num_splits: programs that share the input features of one block of output features.
    """

    kernel: Literal["matvec", "small_batch", "library"]
    block_out: int = 0
    block_in: int = 0
    num_warps: int = 4
    num_stages: int = 1
    num_splits: int = 1


@lru_cache(maxsize=4096)
def stream_plan(num_rows: int, out_features: int, in_features: int, weight_bytes: int) -> StreamPlan:
    """The plan for x [num_rows, in_features] and a weight [out_features, in_features] of `weight_bytes` an element."""
    if num_rows > MAX_STREAMED_ROWS:
        return StreamPlan("library")
    if num_rows == 1:
        return StreamPlan("matvec", 4, 1024, num_warps=4)
    return StreamPlan("small_batch", 64, 128, num_warps=4, num_stages=4, num_splits=2)
