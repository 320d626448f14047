"""Memory layout of the paged cache that the CPU kernels read and write, so that no kernel has to transpose or pack.

Of one layer, with N blocks of B tokens, G key/value heads of D columns; B and D are rounded up to multiples of 16:

| type | keys | values |
|---|---|---|
| float32 | [N, G, D, B] | [N, G, B, D] |
| bfloat16 | [N, G, D / 2, B, 2] | [N, G, B / 2, D, 2] |

Keys are transposed and bfloat16 values interleaved: what a product sums over, columns of keys or tokens of values, lies
in pairs, as the processor's bfloat16 dot products want it. A token at an even place of its block that is the last of
its sequence clears its neighbour's value, so that a pair never holds a stranger's number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from tokenmill.errors import UnsupportedFeatureError
from tokenmill.ops.cpu.jit import device
from tokenmill.ops.cpu.scalars import load_i64
from tokenmill.ops.cpu.simd import load_i32

LANES: Final = 16

STEP_NUM_ROWS: Final = 0
STEP_QUERY_STARTS: Final = 8
STEP_KV_LENS: Final = 16
STEP_BLOCK_TABLES: Final = 24
STEP_TABLE_STRIDE: Final = 32
STEP_SIZE: Final = 5
"""The step's rows for `attention` and the cache writers: `STEP_SIZE` int64 that the executor fills before every step.

Byte offsets of: number of rows R; addresses of int32 `query_starts` [R + 1], `kv_lens` [R] (this step's tokens too) and
`block_tables` [R, ...]; bytes from one row's block table to the next one's.
"""


@dataclass(frozen=True, slots=True)
class CacheLocation:
    """One layer's cache, and the rows of the step.

    Args:
        keys, values: addresses.
        block_stride: bytes from a block to the next one, of keys and of values. Executors let a block of all layers lie
            together, so that the first tokens of a new cache touch few pages.
        is_bfloat16: the type of both; else float32.
        tokens_per_block: B.
        step: address of the step's rows.
    """

    keys: int
    values: int
    block_stride: int
    is_bfloat16: bool
    tokens_per_block: int
    step: int

    def arguments(self) -> tuple[int, ...]:
        """Columns of an op row."""
        return (
            self.keys,
            self.values,
            self.block_stride,
            int(self.is_bfloat16),
            self.tokens_per_block,
            self.step,
        )


def round_up(size: int, multiple: int = LANES) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def cache_shapes(
    num_blocks: int, tokens_per_block: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one layer's keys and values.

    Raises:
        UnsupportedFeatureError: the kernels know no cache of this type or head size.
    """
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise UnsupportedFeatureError(
            f"The CPU kernels cannot attend with heads of {head_dim} columns.",
            field="head_dim",
            remedy="Use a multiple of 8 up to 256, or backend='torch'.",
        )
    tokens, columns = round_up(tokens_per_block), round_up(head_dim)
    if dtype == torch.float32:
        return (num_blocks, num_kv_heads, columns, tokens), (num_blocks, num_kv_heads, tokens, columns)
    if dtype == torch.bfloat16:
        keys = (num_blocks, num_kv_heads, columns // 2, tokens, 2)
        return keys, (num_blocks, num_kv_heads, tokens // 2, columns, 2)
    raise UnsupportedFeatureError(
        f"The CPU kernels have no {str(dtype).removeprefix('torch.')} cache.",
        field="kv_cache_config.dtype",
        remedy="Use float32 or bfloat16, or backend='torch'.",
    )


@device
def query_start(step: int, row: int) -> int:
    """First token of a row in the step."""
    return load_i32(load_i64(step + STEP_QUERY_STARTS) + 4 * row)


@device
def kv_len(step: int, row: int) -> int:
    """Cached tokens of a row, this step's included."""
    return load_i32(load_i64(step + STEP_KV_LENS) + 4 * row)


@device
def block_of(step: int, row: int, index: int) -> int:
    """The row's block of that index."""
    return load_i32(load_i64(step + STEP_BLOCK_TABLES) + row * load_i64(step + STEP_TABLE_STRIDE) + 4 * index)
