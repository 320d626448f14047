"""Attention of one token over a split of at most 256 cached keys, for the query heads that share a key/value head.

Lanes are keys. A sequence of one split is finished at once; others leave partial results that `combine_row` puts
together in order. Called by the kernels in `attention.py` for rows of one token.
"""

from __future__ import annotations

from typing import Final

from tokenmill.ops.cpu.attention_arguments import (
    DECODE_GROUPS,
    HEAD_DIM,
    IS_PAIRS,
    LOWEST,
    NUM_HEADS,
    OUTPUT,
    OUTPUT_STRIDE,
    PARTIALS,
    QUERY,
    QUERY_STRIDE,
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
    round16,
)
from tokenmill.ops.cpu.attention_tiles import (
    ENTRY_COUNT,
    ENTRY_POSITION,
    ENTRY_VALUES,
    GROUP,
    GROUP_ENTRY,
    ROWS_PER_TILE,
    VECTOR_BYTES,
    WIDE_VALUES,
    decode_score_tile,
    decode_value_tile,
)
from tokenmill.ops.cpu.cache_layout import kv_len, query_start
from tokenmill.ops.cpu.intrinsics import argument, float_argument
from tokenmill.ops.cpu.jit import device
from tokenmill.ops.cpu.scalars import load_i64, prefetch, store_i64
from tokenmill.ops.cpu.simd import (
    add,
    broadcast,
    divide,
    fma,
    keep_lanes,
    load,
    load_f32,
    load_first,
    maximum,
    multiply,
    reduce_add,
    reduce_max,
    store,
    store_bfloat16,
    store_f32,
    store_first,
    subtract,
)
from tokenmill.ops.cpu.vector_math import LOG2_E, exp2_negative, soft_cap

SCORE_STRIDE: Final = DECODE_GROUPS * GROUP * 4
MINUS_INFINITY: Final = float("-inf")


@device
def first_visible_group(row: int, sequence: int) -> int:
    """First group of a decode row that its token sees."""
    return group_of(row, max(0, kv_len(argument(row, STEP), sequence) - argument(row, WINDOW)))


@device
def num_decode_groups(row: int, sequence: int) -> int:
    """Key groups that a decode row sees."""
    last = kv_len(argument(row, STEP), sequence) - 1
    return group_of(row, last) + 1 - first_visible_group(row, sequence)


@device
def num_splits(row: int, sequence: int) -> int:
    """Splits of a decode row, which depend on its length alone."""
    return (num_decode_groups(row, sequence) + DECODE_GROUPS - 1) // DECODE_GROUPS


@device
def split_groups(row: int, sequence: int) -> int:
    """Key groups of each split of a decode row but the last, which may have fewer."""
    splits = num_splits(row, sequence)
    return (num_decode_groups(row, sequence) + splits - 1) // splits


@device
def partial_bytes(row: int) -> int:
    """One head's partial result: sums of values, then maximum and sum of the probabilities."""
    return round16(argument(row, HEAD_DIM)) * 4 + VECTOR_BYTES


@device
def partial_address(row: int, slot: int, head: int) -> int:
    """Where the partial result of a split (`slot`, counted over all rows) and query head lies."""
    return argument(row, PARTIALS) + (slot * argument(row, NUM_HEADS) + head) * partial_bytes(row)


@device
def list_split(row: int, table: int, sequence: int, kv_head: int, split: int) -> int:
    """Write the table of a split, whose entries beyond the last group repeat that one; the number of groups."""
    last = kv_len(argument(row, STEP), sequence) - 1
    size = split_groups(row, sequence)
    first_group = first_visible_group(row, sequence) + split * size
    num_groups = min(size, group_of(row, last) + 1 - first_group)
    list_groups(row, table, sequence, kv_head, first_group, num_groups, last)
    for index in range(num_groups, DECODE_GROUPS):
        for offset in range(0, GROUP_ENTRY, 8):
            value = load_i64(table + (num_groups - 1) * GROUP_ENTRY + offset)
            store_i64(table + index * GROUP_ENTRY + offset, value)
    return num_groups


@device
def prefetch_split(row: int, table: int) -> None:
    """Ask for all keys, then all values of a split."""
    elements = argument(row, HEAD_DIM) >> argument(row, IS_PAIRS)
    key_stride = round16(argument(row, TOKENS_PER_BLOCK)) * 4
    value_stride = round16(argument(row, HEAD_DIM)) * 4
    for index in range(0, DECODE_GROUPS, 2):  # neighbours in memory: in its order
        keys, following = load_i64(table + index * GROUP_ENTRY), load_i64(table + (index + 1) * GROUP_ENTRY)
        for element in range(elements):
            prefetch(keys + element * key_stride)
            prefetch(following + element * key_stride)
    for index in range(DECODE_GROUPS):
        entry = table + index * GROUP_ENTRY
        values = load_i64(entry + ENTRY_VALUES)
        for place in range(values, values + load_i64(entry + ENTRY_COUNT) * value_stride, VECTOR_BYTES):
            prefetch(place)


@device
def decode_split(
    row: int, scratch: int, sequence: int, kv_head: int, num_groups: int, slot: int, table: int, ahead: int
) -> None:
    """Compute one split of a decode row.

    Args:
        num_groups, table: what `list_split` wrote.
        slot: where its partial results go, -1: it is the only split.
        ahead: table of the split that this thread computes next, or this one's; it is brought nearer meanwhile, since
            caches consist of pieces too small for the processor to foresee.
    """
    heads = query_heads(row)
    load_decode_queries(row, scratch, sequence, kv_head)
    compute_decode_scores(row, scratch, num_groups, kv_len(argument(row, STEP), sequence) - 1, table, ahead)
    for head in range(heads):
        highest, total = decode_softmax(row, scratch, head, num_groups)
        store_f32(scratch + decode_maxima(row) + 8 * head, highest)
        store_f32(scratch + decode_maxima(row) + 8 * head + 4, total)
    sum_decode_values(row, scratch, num_groups, table, ahead)
    for head in range(heads):
        write_decode_head(row, scratch, sequence, kv_head * heads + head, head, slot)


@device
def decode_maxima(row: int) -> int:
    """Where maximum and sum of each head lie in the scratch memory: over its query, which is used by then."""
    return queries_offset(row)


@device
def load_decode_queries(row: int, scratch: int, sequence: int, kv_head: int) -> None:
    """Scaled queries [heads][D], as float32 or pairs."""
    heads = query_heads(row)
    head_dim = argument(row, HEAD_DIM)
    scale = broadcast(float_argument(row, SCALE))
    source = argument(row, QUERY) + query_start(argument(row, STEP), sequence) * argument(row, QUERY_STRIDE)
    source += kv_head * heads * head_dim * 4
    target = scratch + queries_offset(row)
    for _ in range(heads):
        for column in range(0, head_dim, GROUP):
            values = multiply(load_first(source + column * 4, min(GROUP, head_dim - column)), scale)
            if argument(row, IS_PAIRS) != 0:
                store_bfloat16(target + column * 2, values)
            else:
                store(target + column * 4, values)
        source += head_dim * 4
        target += round16(head_dim) * 4


@device
def compute_decode_scores(row: int, scratch: int, num_groups: int, last: int, table: int, ahead: int) -> None:
    """Scores [heads][keys], capped; -inf for keys that are not seen."""
    heads = query_heads(row)
    is_pairs = argument(row, IS_PAIRS)
    num_elements = argument(row, HEAD_DIM) >> is_pairs
    query_stride = round16(argument(row, HEAD_DIM)) * 4
    key_stride = round16(argument(row, TOKENS_PER_BLOCK)) * 4
    for index in range(0, num_groups, 2):
        for head in range(0, heads, ROWS_PER_TILE):
            decode_score_tile(
                is_pairs,
                min(ROWS_PER_TILE, heads - head),
                scratch + queries_offset(row) + head * query_stride,
                query_stride,
                table + index * GROUP_ENTRY,
                ahead + index * GROUP_ENTRY,
                key_stride,
                num_elements,
                scratch + SCORES + head * SCORE_STRIDE + index * VECTOR_BYTES,
                SCORE_STRIDE,
            )
    cap = float_argument(row, SOFT_CAP)
    first_position = last + 1 - argument(row, WINDOW)
    for index in range(num_groups):
        position = load_i64(table + index * GROUP_ENTRY + ENTRY_POSITION)
        num_keys = num_keys_of(row, table, index, last)
        if cap == 0.0 and num_keys == GROUP and position >= first_position:
            continue
        for head in range(heads):
            place = scratch + SCORES + head * SCORE_STRIDE + index * VECTOR_BYTES
            scores = load(place)
            if cap != 0.0:
                scores = multiply(soft_cap(scores, cap), broadcast(LOG2_E))
            store(place, keep_lanes(scores, max(0, first_position - position), num_keys, MINUS_INFINITY))


@device
def decode_softmax(row: int, scratch: int, head: int, num_groups: int) -> tuple[float, float]:
    """Probabilities of one head in place of its scores, as float32 or pairs; returns their maximum score and sum."""
    scores = scratch + SCORES + head * SCORE_STRIDE
    peaks = broadcast(LOWEST)
    for index in range(num_groups):
        peaks = maximum(peaks, load(scores + index * VECTOR_BYTES))
    highest = reduce_max(peaks)
    peaks = broadcast(highest)
    total = broadcast(0.0)
    for index in range(num_groups):
        value = exp2_negative(subtract(load(scores + index * VECTOR_BYTES), peaks))
        total = add(total, value)
        if argument(row, IS_PAIRS) != 0:
            store_bfloat16(scores + index * (VECTOR_BYTES // 2), value)
        else:
            store(scores + index * VECTOR_BYTES, value)
    return highest, reduce_add(total)


@device
def sum_decode_values(row: int, scratch: int, num_groups: int, table: int, ahead: int) -> None:
    """Outputs [heads][D]: probabilities times values, not yet divided."""
    heads = query_heads(row)
    is_pairs = argument(row, IS_PAIRS)
    stride = round16(argument(row, HEAD_DIM)) * 4
    for head in range(0, heads, ROWS_PER_TILE):
        column = 0
        while column < stride:
            is_wide = 1 if stride - column >= WIDE_VALUES * VECTOR_BYTES else 0
            decode_value_tile(
                is_pairs,
                min(ROWS_PER_TILE, heads - head),
                is_wide,
                table,
                ahead,
                num_groups,
                scratch + SCORES + head * SCORE_STRIDE,
                SCORE_STRIDE,
                VECTOR_BYTES >> is_pairs,
                column,
                stride,
                scratch + outputs_offset(row) + head * stride,
            )
            column += WIDE_VALUES * VECTOR_BYTES if is_wide != 0 else VECTOR_BYTES


@device
def write_decode_head(row: int, scratch: int, sequence: int, head: int, local_head: int, slot: int) -> None:
    """One head's output, or its partial result."""
    head_dim = argument(row, HEAD_DIM)
    stride = round16(head_dim) * 4
    source = scratch + outputs_offset(row) + local_head * stride
    highest = load_f32(scratch + decode_maxima(row) + 8 * local_head)
    total = load_f32(scratch + decode_maxima(row) + 8 * local_head + 4)
    if slot >= 0:
        target = partial_address(row, slot, head)
        for offset in range(0, stride, VECTOR_BYTES):
            store(target + offset, load(source + offset))
        store_f32(target + stride, highest)
        store_f32(target + stride + 4, total)
        return
    target = argument(row, OUTPUT) + query_start(argument(row, STEP), sequence) * argument(row, OUTPUT_STRIDE)
    target += head * head_dim * 4
    factor = broadcast(1.0 / total)
    for column in range(0, head_dim, GROUP):
        values = multiply(load(source + column * 4), factor)
        store_first(target + column * 4, values, min(GROUP, head_dim - column))


@device
def combine_row(row: int, sequence: int, head: int, first_slot: int, count: int) -> None:
    """One head's output of a decode row from the partial results of its splits, in their order."""
    head_dim = argument(row, HEAD_DIM)
    stride = round16(head_dim) * 4
    highest = LOWEST
    for split in range(count):
        highest = max(highest, load_f32(partial_address(row, first_slot + split, head) + stride))
    target = argument(row, OUTPUT) + query_start(argument(row, STEP), sequence) * argument(row, OUTPUT_STRIDE)
    target += head * head_dim * 4
    total = broadcast(0.0)
    for split in range(count):
        partial = partial_address(row, first_slot + split, head) + stride
        factor = exp2_negative(broadcast(load_f32(partial) - highest))
        total = fma(broadcast(load_f32(partial + 4)), factor, total)
    for column in range(0, head_dim, GROUP):
        values = broadcast(0.0)
        for split in range(count):
            partial = partial_address(row, first_slot + split, head)
            factor = exp2_negative(broadcast(load_f32(partial + stride) - highest))
            values = fma(load(partial + column * 4), factor, values)
        store_first(target + column * 4, divide(values, total), min(GROUP, head_dim - column))
