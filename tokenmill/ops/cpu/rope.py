"""The ops `rotation`, `rope`, `write_cache` and `rope_write_cache`: rotary embedding, head norms, and the paged cache.

Rotary embedding (https://arxiv.org/abs/2104.09864) turns column i of a head together with column i + D / 2. One kernel
does all but `rotation`; what an op does not have is 0 in its row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from llvmlite import ir

from tokenmill.ops.cpu.cache_layout import CacheLocation, block_of, kv_len, query_start
from tokenmill.ops.cpu.intrinsics import argument, chunk_range, float_argument
from tokenmill.ops.cpu.jit import device, float_bits, kernel
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS, FIRST_ARGUMENT
from tokenmill.ops.cpu.norm import norm_factor
from tokenmill.ops.cpu.simd import (
    I16,
    I32,
    I64,
    LANES,
    bfloat16_bits,
    bfloat16_pairs,
    broadcast,
    float32,
    float32x16,
    fma,
    int32x16,
    int64,
    load_first,
    load_i32,
    multiply,
    none,
    operation,
    store_first,
    store_masked,
    subtract,
)
from tokenmill.ops.cpu.vector_math import cosine, sine

# Columns of `rotation`.
POSITIONS: Final = FIRST_ARGUMENT
FREQUENCIES: Final = FIRST_ARGUMENT + 1
ANGLES: Final = FIRST_ARGUMENT + 2  # address of the output
ANGLES_STRIDE: Final = FIRST_ARGUMENT + 3
NUM_FREQUENCIES: Final = FIRST_ARGUMENT + 4
FACTOR: Final = FIRST_ARGUMENT + 5

# Columns of `rope_write_cache`.
QUERY: Final = FIRST_ARGUMENT
QUERY_STRIDE: Final = FIRST_ARGUMENT + 1
OUTPUT: Final = FIRST_ARGUMENT + 2
OUTPUT_STRIDE: Final = FIRST_ARGUMENT + 3
KEY: Final = FIRST_ARGUMENT + 4
KEY_STRIDE: Final = FIRST_ARGUMENT + 5
VALUE: Final = FIRST_ARGUMENT + 6
VALUE_STRIDE: Final = FIRST_ARGUMENT + 7
ROTATION: Final = FIRST_ARGUMENT + 8  # 0: nothing is turned
ROTATION_STRIDE: Final = FIRST_ARGUMENT + 9
QUERY_NORM: Final = FIRST_ARGUMENT + 10  # weights [D], or 0
KEY_NORM: Final = FIRST_ARGUMENT + 11
EPSILON: Final = FIRST_ARGUMENT + 12
NUM_HEADS: Final = FIRST_ARGUMENT + 13  # of the query; 0 without one
NUM_KV_HEADS: Final = FIRST_ARGUMENT + 14  # 0: nothing goes to the cache
HEAD_DIM: Final = FIRST_ARGUMENT + 15
KEY_CACHE: Final = FIRST_ARGUMENT + 16
VALUE_CACHE: Final = FIRST_ARGUMENT + 17
BLOCK_STRIDE: Final = FIRST_ARGUMENT + 18
IS_PAIRS: Final = FIRST_ARGUMENT + 19
TOKENS_PER_BLOCK: Final = FIRST_ARGUMENT + 20
STEP: Final = FIRST_ARGUMENT + 21

PAIR_BYTES: Final = 4


def _store_lanes(
    builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, lanes: list[ir.Value], count: ir.Value
) -> None:
    """Write the first `count` numbers, `stride` bytes apart."""

    def store_lane(index: int) -> None:
        place = builder.add(address, builder.mul(stride, I64(index)))
        builder.store(lanes[index], builder.inttoptr(place, lanes[index].type.as_pointer()), align=2)

    with builder.if_else(builder.icmp_signed(">=", count, I64(len(lanes)))) as (whole, rest):
        with whole:
            for index in range(len(lanes)):
                store_lane(index)
        with rest:
            for index in range(len(lanes)):
                with builder.if_then(builder.icmp_signed("<", I64(index), count)):
                    store_lane(index)


@operation(none, int64, int64, float32x16, int64)
def scatter_float32(
    builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, values: ir.Value, count: ir.Value
) -> None:
    """Write the first `count` lanes, `stride` bytes apart."""
    _store_lanes(builder, address, stride, [builder.extract_element(values, I32(i)) for i in range(LANES)], count)


@operation(none, int64, int64, float32x16, int64)
def scatter_pairs(
    builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, values: ir.Value, count: ir.Value
) -> None:
    """Write pairs of neighbouring lanes as bfloat16, `stride` bytes apart; `count` lanes, an even number."""
    halves = builder.trunc(bfloat16_bits(builder, values), ir.VectorType(I16, LANES))
    pairs = builder.bitcast(halves, ir.VectorType(I32, LANES // 2))
    lanes = [builder.extract_element(pairs, I32(i)) for i in range(LANES // 2)]
    _store_lanes(builder, address, stride, lanes, builder.ashr(count, I64(1)))


@operation(none, int64, float32x16, int64)
def scatter_halves(builder: ir.IRBuilder, address: ir.Value, values: ir.Value, count: ir.Value) -> None:
    """Write the first `count` lanes as bfloat16 to every second place of 2 bytes."""
    halves = builder.trunc(bfloat16_bits(builder, values), ir.VectorType(I16, LANES))
    lanes = [builder.extract_element(halves, I32(i)) for i in range(LANES)]
    _store_lanes(builder, address, I64(PAIR_BYTES), lanes, count)


@operation(none, int64, int32x16, int64)
def store_first_ints(builder: ir.IRBuilder, address: ir.Value, values: ir.Value, count: ir.Value) -> None:
    """Write the first `count` lanes."""
    store_masked(builder, address, values, count)


@kernel
def rotation(thread: int, num_threads: int, row: int) -> None:
    """Cosines, then sines, of position * frequency for each token."""
    count = argument(row, NUM_FREQUENCIES)
    frequencies = argument(row, FREQUENCIES)
    factor = broadcast(float_argument(row, FACTOR))
    first, end = chunk_range(thread, num_threads, argument(row, COLUMN_NUM_TOKENS))
    for token in range(first, end):
        position = broadcast(float32(load_i32(argument(row, POSITIONS) + 4 * token)))
        output = argument(row, ANGLES) + token * argument(row, ANGLES_STRIDE)
        for column in range(0, count, LANES):
            number = min(LANES, count - column)
            angles = multiply(position, load_first(frequencies + 4 * column, number))
            store_first(output + 4 * column, multiply(cosine(angles), factor), number)
            store_first(output + 4 * (count + column), multiply(sine(angles), factor), number)


@kernel
def rope_write_cache(thread: int, num_threads: int, row: int) -> None:
    """Heads of the query to the output, keys and values to the cache: normalized and turned. Items: token and head."""
    heads, kv_heads = argument(row, NUM_HEADS), argument(row, NUM_KV_HEADS)
    head_bytes = 4 * argument(row, HEAD_DIM)
    step = argument(row, STEP)
    first, end = chunk_range(thread, num_threads, argument(row, COLUMN_NUM_TOKENS) * (heads + kv_heads))
    sequence = 0
    for item in range(first, end):
        token, head = item // (heads + kv_heads), item % (heads + kv_heads)
        if head < heads:
            source = argument(row, QUERY) + token * argument(row, QUERY_STRIDE) + head * head_bytes
            target = argument(row, OUTPUT) + token * argument(row, OUTPUT_STRIDE) + head * head_bytes
            turn_head(row, token, source, argument(row, QUERY_NORM), target, 0)
            continue
        while query_start(step, sequence + 1) <= token:
            sequence += 1
        if kv_len(step, sequence) > 0:
            write_token(row, token, sequence, head - heads)


@device
def turn_head(row: int, token: int, source: int, norm_weight: int, target: int, key_stride: int) -> None:
    """Normalize and turn one head. `key_stride` 0: to float32 at `target`; else to a column of keys in the cache."""
    head_dim = argument(row, HEAD_DIM)
    half = head_dim // 2
    angles = argument(row, ROTATION) + token * argument(row, ROTATION_STRIDE)
    factor = broadcast(float32(1.0))
    if norm_weight != 0:
        factor = broadcast(norm_factor(source, head_dim, float_argument(row, EPSILON)))
    for column in range(0, half, LANES):
        count = min(LANES, half - column)
        low = load_first(source + 4 * column, count)
        high = load_first(source + 4 * (half + column), count)
        if norm_weight != 0:
            low = multiply(multiply(low, factor), load_first(norm_weight + 4 * column, count))
            high = multiply(multiply(high, factor), load_first(norm_weight + 4 * (half + column), count))
        if argument(row, ROTATION) != 0:
            cosines = load_first(angles + 4 * column, count)
            sines = load_first(angles + 4 * (half + column), count)
            turned = subtract(multiply(low, cosines), multiply(high, sines))
            high = fma(high, cosines, multiply(low, sines))
            low = turned
        if key_stride == 0:
            store_first(target + 4 * column, low, count)
            store_first(target + 4 * (half + column), high, count)
        elif argument(row, IS_PAIRS) != 0:
            scatter_pairs(target + column // 2 * key_stride, key_stride, low, count)
            scatter_pairs(target + (half + column) // 2 * key_stride, key_stride, high, count)
        else:
            scatter_float32(target + column * key_stride, key_stride, low, count)
            scatter_float32(target + (half + column) * key_stride, key_stride, high, count)


@device
def write_token(row: int, token: int, sequence: int, kv_head: int) -> None:
    """One key/value head of a token to the cache; of values see `write_value_pairs`."""
    step = argument(row, STEP)
    tokens, head_dim = argument(row, TOKENS_PER_BLOCK), argument(row, HEAD_DIM)
    is_pairs = argument(row, IS_PAIRS)
    cells, columns = (tokens + LANES - 1) // LANES * LANES, (head_dim + LANES - 1) // LANES * LANES
    position = kv_len(step, sequence) - query_start(step, sequence + 1) + token
    cell = position % tokens
    offset = block_of(step, sequence, position // tokens) * argument(row, BLOCK_STRIDE)
    offset += kv_head * cells * columns * (4 - 2 * is_pairs)
    key = argument(row, KEY) + token * argument(row, KEY_STRIDE) + 4 * kv_head * head_dim
    turn_head(row, token, key, argument(row, KEY_NORM), argument(row, KEY_CACHE) + offset + 4 * cell, 4 * cells)
    value = argument(row, VALUE) + token * argument(row, VALUE_STRIDE) + 4 * kv_head * head_dim
    target = argument(row, VALUE_CACHE) + offset
    if is_pairs != 0:
        is_first = token == query_start(step, sequence)
        has_next = position + 1 < kv_len(step, sequence) and cell + 1 < tokens
        write_value_pairs(row, value, target + cell // 2 * columns * PAIR_BYTES, cell % 2, is_first, has_next)
        return
    for column in range(0, head_dim, LANES):
        count = min(LANES, head_dim - column)
        store_first(target + 4 * (cell * columns + column), load_first(value + 4 * column, count), count)


@device
def write_value_pairs(row: int, value: int, target: int, half: int, is_first: bool, has_next: bool) -> None:
    """A token's values to its half of the pairs at `target`.

    The token of the lower half writes the upper one too: the next token's, or zeros. So a token of the upper half has
    nothing to do, unless it is the first one of its sequence in this step.
    """
    head_dim = argument(row, HEAD_DIM)
    for column in range(0, head_dim, LANES):
        count = min(LANES, head_dim - column)
        values = load_first(value + 4 * column, count)
        place = target + PAIR_BYTES * column
        if half != 0:
            if is_first:
                scatter_halves(place + PAIR_BYTES // 2, values, count)
        elif has_next:
            following = load_first(value + argument(row, VALUE_STRIDE) + 4 * column, count)
            store_first_ints(place, bfloat16_pairs(values, following), count)
        else:
            store_first_ints(place, bfloat16_pairs(values, broadcast(0.0)), count)


def rotation_arguments(
    *, positions: int, frequencies: int, output: tuple[int, int], head_dim: int, factor: float
) -> tuple[int, ...]:
    """Columns of a `rotation` op.

    Args:
        positions: address of int32 [T].
        frequencies: address of float32 [head_dim / 2].
        output: address, and bytes from row to row, of float32 [T, head_dim].
        factor: on all results.
    """
    return (positions, frequencies, *output, head_dim // 2, float_bits(factor))


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeOp:
    """What the row of a `rope_write_cache` op says; pairs are an address, and bytes from row to row, of float32.

    Args:
        head_dim: D.
        query, output: [T, num_heads * D]; may be the same memory. None: no query.
        key, value: [T, num_kv_heads * D]; None: nothing goes to the cache.
        rotation: [T, D], from the op `rotation`; None: nothing is turned.
        query_norm, key_norm: addresses of float32 [D], or 0.
        cache: of the layer, where there are keys and values.
    """

    head_dim: int
    num_heads: int = 0
    num_kv_heads: int = 0
    query: tuple[int, int] | None = None
    output: tuple[int, int] | None = None
    key: tuple[int, int] | None = None
    value: tuple[int, int] | None = None
    rotation: tuple[int, int] | None = None
    query_norm: int = 0
    key_norm: int = 0
    eps: float = 0.0
    cache: CacheLocation | None = None

    def arguments(self) -> tuple[int, ...]:
        """The row from `FIRST_ARGUMENT` on."""
        assert (self.num_heads > 0) == (self.query is not None) == (self.output is not None)
        assert (self.num_kv_heads > 0) == (self.key is not None) == (self.value is not None) == (self.cache is not None)
        operands = (self.query, self.output, self.key, self.value, self.rotation)
        cache = (0, 0, 0, 0, 1, 0) if self.cache is None else self.cache.arguments()
        return (
            *(number for operand in operands for number in operand or (0, 0)),
            self.query_norm,
            self.key_norm,
            float_bits(self.eps),
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            *cache,
        )
