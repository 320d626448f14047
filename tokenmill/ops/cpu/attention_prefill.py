"""Attention of one tile of 32 query rows (token and head of one key/value head) over the paged cache.

Lanes are queries: the maximum and sum of the softmax need no reduction across lanes. Keys come in chunks of 128 with a
running maximum (https://arxiv.org/abs/2205.14135). Called by the kernel in `attention.py` for rows of several tokens.
"""

from __future__ import annotations

from typing import Final

from tokenmill.ops.cpu.attention_arguments import (
    DECODE_LEN,
    FACTORS,
    HEAD_DIM,
    IS_PAIRS,
    LOWEST,
    OUTPUT,
    OUTPUT_STRIDE,
    POSITIONS,
    PREFILL_GROUPS,
    PREFILL_TABLE,
    QUERY,
    QUERY_STRIDE,
    RUNNING_MAX,
    RUNNING_SUM,
    SCALE,
    SCORES,
    SOFT_CAP,
    STEP,
    TOKENS_PER_BLOCK,
    WINDOW,
    group_of,
    list_groups,
    num_keys_of,
    outputs_offset,
    queries_offset,
    query_heads,
    query_len,
    round16,
)
from tokenmill.ops.cpu.attention_tiles import (
    ENTRY_POSITION,
    GROUP,
    GROUP_ENTRY,
    KEYS_PER_TILE,
    QUERY_TILE,
    QUERY_VECTORS,
    ROWS_PER_TILE,
    TILE_STRIDE,
    VECTOR_BYTES,
    WIDE_VALUES,
    score_tile,
    value_tile,
)
from tokenmill.ops.cpu.cache_layout import kv_len, query_start
from tokenmill.ops.cpu.intrinsics import argument, float_argument
from tokenmill.ops.cpu.jit import device
from tokenmill.ops.cpu.scalars import load_i64, store_i32
from tokenmill.ops.cpu.simd import (
    add,
    broadcast,
    load,
    load_f32,
    load_first,
    load_ints,
    maximum,
    multiply,
    store,
    store_bfloat16,
    store_first,
    store_ints,
    subtract,
)
from tokenmill.ops.cpu.vector_math import (
    LOG2_E,
    exp2_negative,
    keep_visible,
    probability_pairs,
    soft_cap,
    transpose_16x16,
)

HALF_TILE: Final = QUERY_TILE // 2
MINUS_INFINITY: Final = float("-inf")


@device
def prefill_tile(row: int, scratch: int, sequence: int, kv_head: int, tile: int) -> None:
    """Compute and write the outputs of the tile-th 32 query rows of a sequence and key/value head."""
    step = argument(row, STEP)
    heads = query_heads(row)
    first = tile * QUERY_TILE
    count = min(QUERY_TILE, query_len(step, sequence) * heads - first)
    start = kv_len(step, sequence) - query_len(step, sequence)
    first_position, last_position = start + first // heads, start + (first + count - 1) // heads
    load_queries(row, scratch, sequence, kv_head, first, count)
    window = argument(row, WINDOW)
    group = group_of(row, max(0, first_position - window + 1))
    if argument(row, DECODE_LEN) == 0:  # chunks begin at the same keys for every tile that sees them
        group -= group % PREFILL_GROUPS
    end = group_of(row, last_position) + 1
    while group < end:
        num_groups = min(PREFILL_GROUPS, end - group)
        list_groups(row, scratch + PREFILL_TABLE, sequence, kv_head, group, num_groups, last_position)
        for index in range(num_groups):
            compute_scores(row, scratch, index, first_position, last_position)
        update_softmax(row, scratch, num_groups, last_position)
        add_values(row, scratch, num_groups, count)
        group += num_groups
    write_outputs(row, scratch, sequence, kv_head, first, count)


@device
def load_queries(row: int, scratch: int, sequence: int, kv_head: int, first: int, count: int) -> None:
    """Transpose the queries, set positions and running values; rows beyond `count` are zero and see nothing."""
    step = argument(row, STEP)
    heads = query_heads(row)
    head_dim = argument(row, HEAD_DIM)
    is_pairs = argument(row, IS_PAIRS)
    stride = round16(head_dim) * 4
    staging = scratch + outputs_offset(row)
    scale = broadcast(float_argument(row, SCALE))
    start = kv_len(step, sequence) - query_len(step, sequence)
    zero = broadcast(0.0)
    for index in range(QUERY_TILE):
        token = (first + index) // heads
        store_i32(scratch + POSITIONS + 4 * index, start + token if index < count else -1)
        head = kv_head * heads + (first + index) % heads
        source = argument(row, QUERY) + (query_start(step, sequence) + token) * argument(row, QUERY_STRIDE)
        source += head * head_dim * 4
        target = staging + index * stride
        for column in range(0, head_dim, GROUP):
            values = zero
            if index < count:
                values = multiply(load_first(source + column * 4, min(GROUP, head_dim - column)), scale)
            if is_pairs != 0:
                store_bfloat16(target + column * 2, values)
            else:
                store(target + column * 4, values)
    queries = scratch + queries_offset(row)
    num_elements = round16(head_dim) >> is_pairs
    for element in range(0, num_elements, GROUP):
        for half in range(2):
            source = staging + half * HALF_TILE * stride + element * 4
            target = queries + element * TILE_STRIDE + half * VECTOR_BYTES
            transpose_16x16(source, stride, target, TILE_STRIDE)
    for index in range(QUERY_TILE):
        for column in range(0, stride, VECTOR_BYTES):
            store(staging + index * stride + column, zero)
    for offset in range(0, TILE_STRIDE, VECTOR_BYTES):
        store(scratch + RUNNING_MAX + offset, broadcast(LOWEST))
        store(scratch + RUNNING_SUM + offset, zero)


@device
def compute_scores(row: int, scratch: int, index: int, first_position: int, last_position: int) -> None:
    """Scores [keys][32] of one listed group, capped and masked; an odd last key of pairs gets a masked partner."""
    is_pairs = argument(row, IS_PAIRS)
    entry = scratch + PREFILL_TABLE + index * GROUP_ENTRY
    scores = scratch + SCORES + index * GROUP * TILE_STRIDE
    queries = scratch + queries_offset(row)
    num_elements = argument(row, HEAD_DIM) >> is_pairs
    key_stride = round16(argument(row, TOKENS_PER_BLOCK)) * 4
    num_keys = num_keys_of(row, scratch + PREFILL_TABLE, index, last_position)
    for key in range(0, num_keys, KEYS_PER_TILE):
        for vector in range(0, 2, QUERY_VECTORS):
            offset = vector * VECTOR_BYTES
            out = scores + key * TILE_STRIDE + offset
            score_tile(is_pairs, load_i64(entry) + key * 4, key_stride, queries + offset, num_elements, out)
    cap = float_argument(row, SOFT_CAP)
    if cap != 0.0:
        for place in range(scores, scores + num_keys * TILE_STRIDE, VECTOR_BYTES):
            store(place, multiply(soft_cap(load(place), cap), broadcast(LOG2_E)))
    position = load_i64(entry + ENTRY_POSITION)
    window = argument(row, WINDOW)
    if position + num_keys - 1 > first_position or position <= last_position - window or num_keys < GROUP:
        for half in range(2):
            query_positions = load_ints(scratch + POSITIONS + half * VECTOR_BYTES)
            for key in range((num_keys + 1) & ~1):
                place = scores + key * TILE_STRIDE + half * VECTOR_BYTES
                seen_as = position + key if key < num_keys else last_position + 1
                store(place, keep_visible(load(place), query_positions, seen_as, window, MINUS_INFINITY))


@device
def update_softmax(row: int, scratch: int, num_groups: int, last_position: int) -> None:
    """Probabilities in place of the scores, as float32 or pairs; new maxima and sums, factors for earlier outputs."""
    for half in range(2):
        offset = half * VECTOR_BYTES
        before = load(scratch + RUNNING_MAX + offset)
        highest = before
        for index in range(num_groups):
            scores = scratch + SCORES + index * GROUP * TILE_STRIDE + offset
            for key in range(num_keys_of(row, scratch + PREFILL_TABLE, index, last_position)):
                highest = maximum(highest, load(scores + key * TILE_STRIDE))
        factor = exp2_negative(subtract(before, highest))
        total = multiply(load(scratch + RUNNING_SUM + offset), factor)
        for index in range(num_groups):
            scores = scratch + SCORES + index * GROUP * TILE_STRIDE + offset
            num_keys = num_keys_of(row, scratch + PREFILL_TABLE, index, last_position)
            if argument(row, IS_PAIRS) != 0:
                for pair in range((num_keys + 1) >> 1):
                    low = exp2_negative(subtract(load(scores + 2 * pair * TILE_STRIDE), highest))
                    high = exp2_negative(subtract(load(scores + (2 * pair + 1) * TILE_STRIDE), highest))
                    total = add(total, add(low, high))
                    store_ints(scores + pair * TILE_STRIDE, probability_pairs(low, high))
            else:
                for key in range(num_keys):
                    value = exp2_negative(subtract(load(scores + key * TILE_STRIDE), highest))
                    total = add(total, value)
                    store(scores + key * TILE_STRIDE, value)
        store(scratch + RUNNING_MAX + offset, highest)
        store(scratch + RUNNING_SUM + offset, total)
        store(scratch + FACTORS + offset, factor)


@device
def add_values(row: int, scratch: int, num_groups: int, count: int) -> None:
    """Scale the outputs by the factors, and add the probabilities times the values."""
    is_pairs = argument(row, IS_PAIRS)
    stride = round16(argument(row, HEAD_DIM)) * 4
    outputs = scratch + outputs_offset(row)
    for query in range(0, count, ROWS_PER_TILE):
        column = 0
        while column < stride:
            vectors = min(WIDE_VALUES, (stride - column) // VECTOR_BYTES)
            value_tile(
                is_pairs,
                vectors,
                scratch + PREFILL_TABLE,
                num_groups,
                scratch + SCORES + query * 4,
                GROUP * TILE_STRIDE,
                scratch + FACTORS + query * 4,
                column,
                stride,
                outputs + query * stride,
            )
            column += vectors * VECTOR_BYTES


@device
def write_outputs(row: int, scratch: int, sequence: int, kv_head: int, first: int, count: int) -> None:
    """Divide by the sums."""
    step = argument(row, STEP)
    heads = query_heads(row)
    head_dim = argument(row, HEAD_DIM)
    stride = round16(head_dim) * 4
    for index in range(count):
        factor = broadcast(1.0 / load_f32(scratch + RUNNING_SUM + 4 * index))
        token = (first + index) // heads
        head = kv_head * heads + (first + index) % heads
        target = argument(row, OUTPUT) + (query_start(step, sequence) + token) * argument(row, OUTPUT_STRIDE)
        target += head * head_dim * 4
        source = scratch + outputs_offset(row) + index * stride
        for column in range(0, head_dim, GROUP):
            values = multiply(load(source + column * 4), factor)
            store_first(target + column * 4, values, min(GROUP, head_dim - column))
