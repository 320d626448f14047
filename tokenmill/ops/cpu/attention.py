"""Paged attention of a step: decode rows and prompt chunks together, causal, grouped queries, window and soft cap.

Two ops in the list: `attention` computes tiles of prompts (`attention_prefill.py`) and splits of decode rows
(`attention_decode.py`); `attention_combine` finishes decode rows of several splits. The builder of op lists makes their
rows with `attention_arguments`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from tokenmill.ops.cpu.attention_arguments import (
    DECODE_GROUPS,
    DECODE_LEN,
    DECODE_TABLES,
    NO_WINDOW,
    NUM_HEADS,
    NUM_KV_HEADS,
    SCRATCH,
    SCRATCH_BYTES,
    STEP,
    TABLE_BYTES,
    group_of,
    num_rows,
    query_heads,
    query_len,
    scratch_bytes,
)
from tokenmill.ops.cpu.attention_decode import (
    combine_row,
    decode_split,
    list_split,
    num_splits,
    prefetch_split,
    split_groups,
)
from tokenmill.ops.cpu.attention_prefill import prefill_tile
from tokenmill.ops.cpu.attention_tiles import GROUP, QUERY_TILE, VECTOR_BYTES
from tokenmill.ops.cpu.cache_layout import CacheLocation, kv_len
from tokenmill.ops.cpu.intrinsics import argument, chunk_range
from tokenmill.ops.cpu.jit import device, float_bits, kernel

ITEM_COST: Final = 2
PREFILL_COST: Final = 8
"""Rough cost of a prefill tile for each key group, where a decode split costs 1, and of any item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOp:
    """What the row of an `attention` op says.

    Args:
        query, output: address, and bytes from row to row, of float32 [T, H * D]; may be the same memory.
        cache: of the layer.
        scale: factor on the scores.
        scratch: `num_threads * scratch_bytes(...)` bytes.
        partials: `partial_bytes(...)` bytes.
        deterministic: compute rows of one token as those of prompts are, so that a token has the same bits in both.
    """

    query: tuple[int, int]
    output: tuple[int, int]
    cache: CacheLocation
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    scratch: int
    partials: int
    sliding_window: int | None = None
    soft_cap: float | None = None
    deterministic: bool = False

    def arguments(self) -> tuple[int, ...]:
        """The row from `FIRST_ARGUMENT` on; the same for `attention` and `attention_combine`."""
        return (
            *self.query,
            *self.output,
            *self.cache.arguments(),
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            float_bits(self.scale if self.soft_cap else self.scale * math.log2(math.e)),
            NO_WINDOW if self.sliding_window is None else self.sliding_window,
            float_bits(self.soft_cap or 0.0),
            self.scratch,
            scratch_bytes(self.num_heads, self.num_kv_heads, self.head_dim),
            self.partials,
            0 if self.deterministic else 1,
        )


def partial_bytes(num_heads: int, head_dim: int, tokens_per_block: int, max_blocks: int, max_rows: int) -> int:
    """Memory for partial results of decode rows: enough when all rows together use at most `max_blocks` blocks.

    Rows that share cached blocks count them each.
    """
    groups = max_blocks * -(-tokens_per_block // GROUP)
    columns = -(-head_dim // GROUP) * GROUP
    return (groups // DECODE_GROUPS + max_rows) * num_heads * (columns * 4 + VECTOR_BYTES)


@device
def tile_cost(row: int, sequence: int, tile: int) -> int:
    """Cost of a prefill tile: by the keys that its last query sees."""
    step = argument(row, STEP)
    length = query_len(step, sequence)
    last_token = min(length - 1, ((tile + 1) * QUERY_TILE - 1) // query_heads(row))
    return ITEM_COST + PREFILL_COST * (group_of(row, kv_len(step, sequence) - length + last_token) + 1)


@device
def split_cost(row: int, sequence: int) -> int:
    """Cost of each split of a decode row."""
    return ITEM_COST + split_groups(row, sequence)


@device
def total_cost(row: int) -> int:
    """Cost of all items of the step."""
    step, decode_len = argument(row, STEP), argument(row, DECODE_LEN)
    total = 0
    for sequence in range(num_rows(step)):
        length = query_len(step, sequence)
        if 0 < length <= decode_len:
            total += num_splits(row, sequence) * split_cost(row, sequence)
        elif length > 0:
            for tile in range((length * query_heads(row) + QUERY_TILE - 1) // QUERY_TILE):
                total += tile_cost(row, sequence, tile)
    return total * argument(row, NUM_KV_HEADS)


@kernel
def attention(thread: int, num_threads: int, row: int) -> None:
    """A thread computes the items whose middle, in the cost of all items one after the other, is in its share.

    A decode split waits for the next one to be known, so that its keys and values are on their way meanwhile.
    """
    step, decode_len = argument(row, STEP), argument(row, DECODE_LEN)
    scratch = argument(row, SCRATCH) + thread * argument(row, SCRATCH_BYTES)
    table, ahead = scratch + DECODE_TABLES, scratch + DECODE_TABLES + TABLE_BYTES
    total = total_cost(row)
    begin, end = 2 * total * thread, 2 * total * (thread + 1)
    done, slot = 0, 0
    waiting, waiting_head, waiting_groups, waiting_slot = -1, 0, 0, 0
    for sequence in range(num_rows(step)):
        length = query_len(step, sequence)
        splits = num_splits(row, sequence) if 0 < length <= decode_len else 0
        tiles = (length * query_heads(row) + QUERY_TILE - 1) // QUERY_TILE if length > decode_len else 0
        for kv_head in range(argument(row, NUM_KV_HEADS)):
            for item in range(splits + tiles):
                cost = tile_cost(row, sequence, item) if length > decode_len else split_cost(row, sequence)
                middle = (2 * done + cost) * num_threads
                done += cost
                if middle < begin or middle >= end:
                    continue
                if length > decode_len:
                    prefill_tile(row, scratch, sequence, kv_head, item)
                    continue
                groups = list_split(row, ahead, sequence, kv_head, item)
                if waiting < 0:
                    prefetch_split(row, ahead)
                else:
                    decode_split(row, scratch, waiting, waiting_head, waiting_groups, waiting_slot, table, ahead)
                waiting, waiting_head, waiting_groups = sequence, kv_head, groups
                waiting_slot = slot + item if splits > 1 else -1
                table, ahead = ahead, table
        if splits > 1:
            slot += splits
    if waiting >= 0:
        decode_split(row, scratch, waiting, waiting_head, waiting_groups, waiting_slot, table, table)


@kernel
def attention_combine(thread: int, num_threads: int, row: int) -> None:
    """Finish the decode rows of several splits. After `attention` and a barrier."""
    step, decode_len = argument(row, STEP), argument(row, DECODE_LEN)
    num_heads = argument(row, NUM_HEADS)
    first, end = chunk_range(thread, num_threads, num_rows(step) * num_heads)
    slot = 0
    for sequence in range(num_rows(step)):
        if query_len(step, sequence) != 1 or decode_len == 0:
            continue
        splits = num_splits(row, sequence)
        if splits > 1:
            for head in range(num_heads):
                if first <= sequence * num_heads + head < end:
                    combine_row(row, sequence, head, slot, splits)
            slot += splits
