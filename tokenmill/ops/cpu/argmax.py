"""The op `argmax`: the most likely token of each row of logits, so that no step of a greedy answer needs the host.

Two rows of the op list: the first looks at fixed pieces of each row of logits, the second puts together what was found.
Pieces do not depend on the number of threads; of equal logits the first one is taken, by any. A third row, at the front
of the list, makes these tokens the input of the next step.
"""

from __future__ import annotations

from typing import Final

from llvmlite import ir

from tokenmill.ops.cpu.dot_product import Loop
from tokenmill.ops.cpu.intrinsics import argument, chunk_range
from tokenmill.ops.cpu.jit import device, kernel
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS, FIRST_ARGUMENT
from tokenmill.ops.cpu.scalars import store_i32
from tokenmill.ops.cpu.simd import (
    F32,
    I32,
    I32X16,
    I64,
    LANES,
    constant,
    int64,
    load_f32,
    load_i32,
    load_vector,
    none,
    operation,
    splat,
    store_vector,
)

LOGITS: Final = FIRST_ARGUMENT  # address of float32 [rows, columns]
COLUMNS: Final = FIRST_ARGUMENT + 1
FOUND: Final = FIRST_ARGUMENT + 2  # address of `argmax_scratch_bytes(rows)`
TOKENS: Final = FIRST_ARGUMENT + 3  # address of int32 [rows]
PART: Final = FIRST_ARGUMENT + 4  # of the following

FIND: Final = 0
COMBINE: Final = 1
ADVANCE: Final = 2

# Columns of `ADVANCE`, instead of the first three.
TOKEN_IDS: Final = FIRST_ARGUMENT  # address of int32 [rows], the input of a step
POSITIONS: Final = FIRST_ARGUMENT + 1  # address of int32 [rows]
KV_LENS: Final = FIRST_ARGUMENT + 2  # address of int32 [rows]

NUM_PIECES: Final = 8
"""Pieces of a row, for different threads."""

FOUND_BYTES: Final = 2 * 4 * LANES
"""Of a piece: the largest number in each lane, and its column."""

LARGEST: Final = 3.4028234663852886e38
"""The largest finite float32."""

NOT_FINITE: Final = -1
"""The token of a row that has a number which is none, or whose largest one is infinite."""


def argmax_scratch_bytes(num_rows: int) -> int:
    """Memory for what the pieces of so many rows give."""
    return num_rows * NUM_PIECES * FOUND_BYTES


@operation(none, int64, int64, int64, int64)
def find_largest(
    builder: ir.IRBuilder, source: ir.Value, first_column: ir.Value, num_vectors: ir.Value, result: ir.Value
) -> None:
    """In each lane the largest of at least one vector of float32, and its column; not-a-number is larger than all."""
    lanes = ir.Constant(I32X16, list(range(LANES)))
    columns = builder.add(splat(builder, builder.trunc(first_column, I32)), lanes)
    start = builder.add(source, builder.mul(first_column, I64(4)))
    loop = Loop(builder, num_vectors, [start, columns, constant(F32, float("-inf")), columns])
    place, column, best, best_column = loop.carried
    values = load_vector(builder, place, F32)
    is_nan = builder.fcmp_unordered("uno", values, values)
    is_better = builder.or_(builder.fcmp_ordered(">", values, best), is_nan)
    best, best_column = builder.select(is_better, values, best), builder.select(is_better, column, best_column)
    loop.close([builder.add(place, I64(4 * LANES)), builder.add(column, constant(I32, LANES)), best, best_column])
    store_vector(builder, result, best)
    store_vector(builder, builder.add(result, I64(4 * LANES)), best_column)


@device
def advance(row: int, token: int) -> None:
    """From a step of one token for each sequence to the next one."""
    store_i32(argument(row, TOKEN_IDS) + 4 * token, load_i32(argument(row, TOKENS) + 4 * token))
    position, kv_len = argument(row, POSITIONS) + 4 * token, argument(row, KV_LENS) + 4 * token
    store_i32(position, load_i32(position) + 1)
    store_i32(kv_len, load_i32(kv_len) + 1)


@kernel
def argmax(thread: int, num_threads: int, row: int) -> None:
    """One part of the op, see the module."""
    num_rows, columns = argument(row, COLUMN_NUM_TOKENS), argument(row, COLUMNS)
    num_vectors = columns // LANES
    if argument(row, PART) == FIND:
        first, end = chunk_range(thread, num_threads, num_rows * NUM_PIECES)
        for item in range(first, end):
            begin, stop = chunk_range(item % NUM_PIECES, NUM_PIECES, num_vectors)
            logits = argument(row, LOGITS) + item // NUM_PIECES * columns * 4
            if stop > begin:
                find_largest(logits, begin * LANES, stop - begin, argument(row, FOUND) + item * FOUND_BYTES)
        return
    first, end = chunk_range(thread, num_threads, num_rows)
    for token in range(first, end):
        if argument(row, PART) == ADVANCE:
            advance(row, token)
            continue
        logits = argument(row, LOGITS) + token * columns * 4
        best, best_column = load_f32(logits), 0
        is_number = best == best
        for piece in range(NUM_PIECES):
            begin, stop = chunk_range(piece, NUM_PIECES, num_vectors)
            found = argument(row, FOUND) + (token * NUM_PIECES + piece) * FOUND_BYTES
            for lane in range(LANES if stop > begin else 0):
                value, column = load_f32(found + 4 * lane), load_i32(found + 4 * LANES + 4 * lane)
                is_number = is_number and value == value
                if value > best or (value == best and column < best_column):
                    best, best_column = value, column
        for column in range(num_vectors * LANES, columns):
            value = load_f32(logits + 4 * column)
            is_number = is_number and value == value
            if value > best:
                best, best_column = value, column
        is_finite = is_number and -LARGEST <= best <= LARGEST
        store_i32(argument(row, TOKENS) + 4 * token, best_column if is_finite else NOT_FINITE)


def argmax_arguments(
    *, logits: int, columns: int, scratch: int, tokens: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Columns of the op's two rows, in order.

    Args:
        logits: address of float32 [rows, columns].
        scratch: address of `argmax_scratch_bytes(rows)` bytes.
        tokens: address of int32 [rows]; `NOT_FINITE` where the largest logit is not a finite number.
    """
    shared = (logits, columns, scratch, tokens)
    return (*shared, FIND), (*shared, COMBINE)


def advance_arguments(*, tokens: int, token_ids: int, positions: int, kv_lens: int) -> tuple[int, ...]:
    """Columns of the row that goes on with the tokens that were found: addresses of int32 [rows] each."""
    return (token_ids, positions, kv_lens, tokens, ADVANCE)
