"""Columns of an attention op's row, the scratch memory of a thread, and the list of key groups that a tile looks at."""

from __future__ import annotations

from typing import Final

from tokenmill.ops.cpu.attention_tiles import (
    ENTRY_COUNT,
    ENTRY_POSITION,
    ENTRY_VALUES,
    GROUP,
    GROUP_ENTRY,
    QUERY_TILE,
)
from tokenmill.ops.cpu.cache_layout import STEP_NUM_ROWS, block_of, kv_len, query_start
from tokenmill.ops.cpu.intrinsics import argument
from tokenmill.ops.cpu.jit import device
from tokenmill.ops.cpu.layout import FIRST_ARGUMENT
from tokenmill.ops.cpu.scalars import load_i64, store_i64

QUERY: Final = FIRST_ARGUMENT
QUERY_STRIDE: Final = FIRST_ARGUMENT + 1
OUTPUT: Final = FIRST_ARGUMENT + 2
OUTPUT_STRIDE: Final = FIRST_ARGUMENT + 3
KEY_CACHE: Final = FIRST_ARGUMENT + 4
VALUE_CACHE: Final = FIRST_ARGUMENT + 5
BLOCK_STRIDE: Final = FIRST_ARGUMENT + 6
IS_PAIRS: Final = FIRST_ARGUMENT + 7
TOKENS_PER_BLOCK: Final = FIRST_ARGUMENT + 8
STEP: Final = FIRST_ARGUMENT + 9
NUM_HEADS: Final = FIRST_ARGUMENT + 10
NUM_KV_HEADS: Final = FIRST_ARGUMENT + 11
HEAD_DIM: Final = FIRST_ARGUMENT + 12
SCALE: Final = FIRST_ARGUMENT + 13  # of the scores, in units of log2; of uncapped ones if there is a cap
WINDOW: Final = FIRST_ARGUMENT + 14  # NO_WINDOW without one
SOFT_CAP: Final = FIRST_ARGUMENT + 15  # 0 without one
SCRATCH: Final = FIRST_ARGUMENT + 16
SCRATCH_BYTES: Final = FIRST_ARGUMENT + 17
PARTIALS: Final = FIRST_ARGUMENT + 18
DECODE_LEN: Final = FIRST_ARGUMENT + 19  # most tokens of a row that is split over threads: 1, or 0 for none

NO_WINDOW: Final = 1 << 30

PREFILL_GROUPS: Final = 8
"""Key groups of a prefill tile between two updates of its running maximum."""

DECODE_GROUPS: Final = 16
"""Most key groups of one split of a decode row."""

LOWEST: Final = -1e30
"""Stands for the maximum of no scores."""

# Scratch of a thread: the parts of a prefill tile, or of a decode split, as byte offsets. `wide` is D rounded up.
DECODE_TABLES: Final = 0  # two of [DECODE_GROUPS] entries: this split's and the next one's
TABLE_BYTES: Final = DECODE_GROUPS * GROUP_ENTRY
PREFILL_TABLE: Final = DECODE_TABLES + 2 * TABLE_BYTES  # [PREFILL_GROUPS] entries
RUNNING_MAX: Final = PREFILL_TABLE + PREFILL_GROUPS * GROUP_ENTRY  # [32] float32
RUNNING_SUM: Final = RUNNING_MAX + 128
FACTORS: Final = RUNNING_SUM + 128
POSITIONS: Final = FACTORS + 128  # [32] int32
SCORES: Final = 2048  # prefill [128 keys][32 queries]; decode [query heads][256 keys]


@device
def query_heads(row: int) -> int:
    """Query heads that share a key/value head."""
    return argument(row, NUM_HEADS) // argument(row, NUM_KV_HEADS)


@device
def round16(size: int) -> int:
    """The next multiple of 16."""
    return (size + 15) & ~15


def scores_bytes(num_heads: int, num_kv_heads: int) -> int:
    """Size of the part that holds scores."""
    return max(PREFILL_GROUPS * GROUP * QUERY_TILE * 4, num_heads // num_kv_heads * DECODE_GROUPS * GROUP * 4)


def scratch_bytes(num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Scratch memory of one thread: head, scores, queries and outputs of a tile."""
    rows = max(QUERY_TILE, num_heads // num_kv_heads)
    columns = -(-head_dim // GROUP) * GROUP
    return SCORES + scores_bytes(num_heads, num_kv_heads) + 2 * rows * columns * 4 + 64


@device
def queries_offset(row: int) -> int:
    """Where the queries of a tile lie in the scratch memory."""
    decode = query_heads(row) * (DECODE_GROUPS * GROUP * 4)
    prefill = PREFILL_GROUPS * GROUP * QUERY_TILE * 4
    return SCORES + max(decode, prefill)


@device
def outputs_offset(row: int) -> int:
    """Where the outputs of a tile lie."""
    rows = max(QUERY_TILE, query_heads(row))
    return queries_offset(row) + rows * round16(argument(row, HEAD_DIM)) * 4


@device
def group_of(row: int, position: int) -> int:
    """Number of the group that a position lies in; groups of a sequence are counted from its start."""
    tokens = argument(row, TOKENS_PER_BLOCK)
    return position // tokens * (round16(tokens) // GROUP) + position % tokens // GROUP


@device
def list_groups(row: int, table: int, sequence: int, kv_head: int, first: int, count: int, last_position: int) -> None:
    """Write the table for groups `first` to `first + count - 1` of a sequence; no key is later than `last_position`."""
    step = argument(row, STEP)
    tokens = argument(row, TOKENS_PER_BLOCK)
    cells = round16(tokens)
    groups_per_block = cells // GROUP
    columns = round16(argument(row, HEAD_DIM))
    is_pairs = argument(row, IS_PAIRS)
    head_bytes = cells * columns * (4 - 2 * is_pairs)
    for index in range(count):
        group = first + index
        block_index = group // groups_per_block
        cell = group % groups_per_block * GROUP
        offset = block_of(step, sequence, block_index) * argument(row, BLOCK_STRIDE) + kv_head * head_bytes
        position = block_index * tokens + cell
        num_keys = min(GROUP, tokens - cell, last_position + 1 - position)
        entry = table + index * GROUP_ENTRY
        store_i64(entry, argument(row, KEY_CACHE) + offset + cell * 4)
        store_i64(entry + ENTRY_VALUES, argument(row, VALUE_CACHE) + offset + cell * columns * (4 - 2 * is_pairs))
        store_i64(entry + ENTRY_COUNT, (num_keys + is_pairs) >> is_pairs)
        store_i64(entry + ENTRY_POSITION, position)


@device
def num_keys_of(row: int, table: int, index: int, last_position: int) -> int:
    """Keys of a listed group."""
    tokens = argument(row, TOKENS_PER_BLOCK)
    position = load_i64(table + index * GROUP_ENTRY + ENTRY_POSITION)
    return min(GROUP, tokens - position % tokens, last_position + 1 - position)


@device
def query_len(step: int, sequence: int) -> int:
    """Tokens of a row in this step; 0 for rows that pad the batch."""
    if kv_len(step, sequence) == 0:
        return 0
    return query_start(step, sequence + 1) - query_start(step, sequence)


@device
def num_rows(step: int) -> int:
    """Rows of the step."""
    return load_i64(step + STEP_NUM_ROWS)
