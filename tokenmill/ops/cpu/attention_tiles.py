"""Register tiles of attention: scores of keys and queries, and probabilities times values, over the paged cache.

Written for `attention_prefill.py` and `attention_decode.py`. `is_pairs` (0 or 1) says whether elements are pairs of
bfloat16 (see `cache_layout.py`) or float32. The key groups of a tile are listed in scratch memory: a table with
`GROUP_ENTRY` bytes a group.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from llvmlite import ir

from tokenmill.ops.cpu.simd import F32, I64, int64, load_vector, none, operation, splat, store_vector
from tokenmill.ops.cpu.tiles import (
    CACHE_KINDS,
    Accumulators,
    ElementKind,
    Matrix,
    emit_cases,
    emit_loop,
    has_wide_registers,
    offsets,
    tile_loop,
    zeros,
)

QUERY_TILE: Final = 32
"""Query rows (token and head) that a prefill tile computes together."""

GROUP: Final = 16
"""Neighbouring cells of a cache block that are worked on together."""

GROUP_ENTRY: Final = 32
"""Bytes of a group in the table; int64 each: address of its keys, of its values, number of its elements along the keys
(cells, or pairs of them), and position of its first key."""

ENTRY_VALUES: Final = 8
ENTRY_COUNT: Final = 16
ENTRY_POSITION: Final = 24

KEYS_PER_TILE: Final = 8 if has_wide_registers() else 4
QUERY_VECTORS: Final = 2 if has_wide_registers() else 1
"""Size of the prefill tile of scores, in keys and vectors of queries."""

WIDE_VALUES: Final = 4 if has_wide_registers() else 1
"""Vectors of a head that the value tiles compute together where there are as many."""

ROWS_PER_TILE: Final = 4
"""Query rows of the other tiles; the decode tiles also come with fewer."""

VECTOR_BYTES: Final = 64
TILE_STRIDE: Final = QUERY_TILE * 4

_MAX_CASES: Final = 64


@operation(none, int64, int64, int64, int64, int64, int64)
def score_tile(
    builder: ir.IRBuilder,
    is_pairs: ir.Value,
    keys: ir.Value,
    key_stride: ir.Value,
    queries: ir.Value,
    count: ir.Value,
    out: ir.Value,
) -> None:
    """out[KEYS_PER_TILE keys][QUERY_VECTORS * 16 queries] = keys^T queries over `count` elements of the head."""

    def emit(kind: ElementKind) -> None:
        a = Matrix(offsets(builder, keys, 4, KEYS_PER_TILE), key_stride)
        b = Matrix(offsets(builder, queries, VECTOR_BYTES, QUERY_VECTORS), I64(TILE_STRIDE))
        totals = tile_loop(builder, kind, a, b, count, zeros(KEYS_PER_TILE, QUERY_VECTORS))
        _store_rows(builder, totals, offsets(builder, out, TILE_STRIDE, KEYS_PER_TILE))

    emit_cases(builder, is_pairs, {index: partial(emit, kind) for index, kind in enumerate(CACHE_KINDS)})


@operation(none, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)
def decode_score_tile(
    builder: ir.IRBuilder,
    is_pairs: ir.Value,
    rows: ir.Value,
    queries: ir.Value,
    query_stride: ir.Value,
    groups: ir.Value,
    ahead: ir.Value,
    key_stride: ir.Value,
    count: ir.Value,
    out: ir.Value,
    out_stride: ir.Value,
) -> None:
    """out[rows][16 keys of each of two groups] = queries keys over `count` elements of the head; 1 to 4 rows.

    `groups` and `ahead` are addresses of two entries of a table; those of `ahead` will be wanted soon.
    """
    current, later = ([_load(builder, table, index * GROUP_ENTRY) for index in (0, 1)] for table in (groups, ahead))
    together = [slice(0, 2)] if has_wide_registers() else [slice(0, 1), slice(1, 2)]

    def emit(kind: ElementKind, num_rows: int) -> None:
        a = Matrix(offsets(builder, queries, query_stride, num_rows), I64(4))
        for index, keys in enumerate(together):
            b = Matrix(current[keys], key_stride)
            totals = tile_loop(builder, kind, a, b, count, zeros(num_rows, len(b.addresses)), later[keys])
            first = builder.add(out, I64(index * VECTOR_BYTES))
            _store_rows(builder, totals, offsets(builder, first, out_stride, num_rows))

    cases = {
        _case(index, num_rows): partial(emit, kind, num_rows)
        for index, kind in enumerate(CACHE_KINDS)
        for num_rows in range(1, ROWS_PER_TILE + 1)
    }
    emit_cases(builder, _key(builder, is_pairs, rows), cases)


@operation(none, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)
def value_tile(
    builder: ir.IRBuilder,
    is_pairs: ir.Value,
    vectors: ir.Value,
    table: ir.Value,
    num_groups: ir.Value,
    probabilities: ir.Value,
    group_stride: ir.Value,
    factors: ir.Value,
    column: ir.Value,
    value_stride: ir.Value,
    out: ir.Value,
) -> None:
    """out = out * factor of the row + probabilities values: 4 query rows, 1 to 4 vectors from byte `column` on."""

    def emit(kind: ElementKind, num_vectors: int) -> None:
        row_addresses = offsets(builder, builder.add(out, column), value_stride, ROWS_PER_TILE)
        start = []
        for row, address in enumerate(row_addresses):
            pointer = builder.inttoptr(builder.add(factors, I64(4 * row)), F32.as_pointer())
            factor = splat(builder, builder.load(pointer, align=4))
            columns = offsets(builder, address, VECTOR_BYTES, num_vectors)
            start.append([builder.fmul(load_vector(builder, place, F32), factor) for place in columns])
        groups = _Groups(table, num_groups, I64(TILE_STRIDE), group_stride, column, value_stride)
        rows = offsets(builder, probabilities, 4, ROWS_PER_TILE)
        _store_rows(builder, _add_groups(builder, kind, groups, rows, start), row_addresses)

    cases = {
        _case(index, num_vectors): partial(emit, kind, num_vectors)
        for index, kind in enumerate(CACHE_KINDS)
        for num_vectors in range(1, WIDE_VALUES + 1)
    }
    emit_cases(builder, _key(builder, is_pairs, vectors), cases)


@operation(none, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)
def decode_value_tile(
    builder: ir.IRBuilder,
    is_pairs: ir.Value,
    rows: ir.Value,
    is_wide: ir.Value,
    table: ir.Value,
    ahead: ir.Value,
    num_groups: ir.Value,
    probabilities: ir.Value,
    row_stride: ir.Value,
    group_stride: ir.Value,
    column: ir.Value,
    value_stride: ir.Value,
    out: ir.Value,
) -> None:
    """out[rows] = probabilities values: 1 to 4 rows; one vector of the head from `column` on, or WIDE_VALUES.

    `ahead` is a table of as many groups that will be wanted soon.
    """

    def emit(kind: ElementKind, num_rows: int, num_vectors: int) -> None:
        groups = _Groups(table, num_groups, I64(4), group_stride, column, value_stride, ahead)
        addresses = offsets(builder, probabilities, row_stride, num_rows)
        totals = _add_groups(builder, kind, groups, addresses, zeros(num_rows, num_vectors))
        _store_rows(builder, totals, offsets(builder, builder.add(out, column), value_stride, num_rows))

    cases = {
        _case(index, num_rows + wide * (ROWS_PER_TILE + 1)): partial(emit, kind, num_rows, WIDE_VALUES if wide else 1)
        for index, kind in enumerate(CACHE_KINDS)
        for num_rows in range(1, ROWS_PER_TILE + 1)
        for wide in (0, 1)
    }
    shape = builder.add(rows, builder.mul(is_wide, I64(ROWS_PER_TILE + 1)))
    emit_cases(builder, _key(builder, is_pairs, shape), cases)


class _Groups:
    """Where the values of a table's groups, and their probabilities, lie."""

    def __init__(
        self,
        table: ir.Value,
        num_groups: ir.Value,
        element_stride: ir.Value,
        group_stride: ir.Value,
        column: ir.Value,
        value_stride: ir.Value,
        ahead: ir.Value | None = None,
    ) -> None:
        self.table = table
        self.ahead = ahead  # a table of groups to bring nearer
        self.num_groups = num_groups
        self.element_stride = element_stride  # of the probabilities: bytes to the next element, to the next group
        self.group_stride = group_stride
        self.column = column
        self.value_stride = value_stride


def _add_groups(
    builder: ir.IRBuilder, kind: ElementKind, groups: _Groups, rows: list[ir.Value], start: Accumulators
) -> Accumulators:
    """Add probabilities * values of all groups to the accumulators `start` [rows][vectors]."""

    def add_group(index: ir.Value, totals: Accumulators) -> Accumulators:
        entry = builder.add(groups.table, builder.mul(index, I64(GROUP_ENTRY)))
        first_value = builder.add(_load(builder, entry, ENTRY_VALUES), groups.column)
        group_offset = builder.mul(index, groups.group_stride)
        a = Matrix([builder.add(row, group_offset) for row in rows], groups.element_stride)
        b = Matrix(offsets(builder, first_value, VECTOR_BYTES, len(start[0])), groups.value_stride)
        later: list[ir.Value] = []
        if groups.ahead is not None:
            place = builder.add(groups.ahead, builder.mul(index, I64(GROUP_ENTRY)))
            later_value = builder.add(_load(builder, place, ENTRY_VALUES), groups.column)
            later = offsets(builder, later_value, VECTOR_BYTES, len(start[0]))
        return tile_loop(builder, kind, a, b, _load(builder, entry, ENTRY_COUNT), totals, later)

    return emit_loop(builder, groups.num_groups, start, add_group)


def _load(builder: ir.IRBuilder, address: ir.Value, offset: int) -> ir.Value:
    return builder.load(builder.inttoptr(builder.add(address, I64(offset)), I64.as_pointer()), align=8)


def _store_rows(builder: ir.IRBuilder, totals: Accumulators, addresses: list[ir.Value]) -> None:
    for address, row in zip(addresses, totals, strict=True):
        for place, total in zip(offsets(builder, address, VECTOR_BYTES, len(row)), row, strict=True):
            store_vector(builder, place, total)


def _case(kind: int, shape: int) -> int:
    return kind * _MAX_CASES + shape


def _key(builder: ir.IRBuilder, is_pairs: ir.Value, shape: ir.Value) -> ir.Value:
    return builder.add(builder.mul(is_pairs, I64(_MAX_CASES)), shape)
