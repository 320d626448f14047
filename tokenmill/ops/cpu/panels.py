"""Quantizes a group of 32 columns of a whole panel of tokens at once, lanes being tokens: no sums across lanes.

A kernel fills a tile of float32 [16 tokens, 32 columns] in its stack memory, and `store_panel_group` makes a record of
`int8_group32` of it (see `layout.py`), to the bit what `store_group` of `activations.py` writes token by token.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from llvmlite import ir

from tokenmill.ops.cpu.jit import device
from tokenmill.ops.cpu.layout import GROUP_SIZE, MAX_PANEL_WIDTH
from tokenmill.ops.cpu.simd import (
    F32X16,
    I8,
    I32,
    I32X16,
    I64,
    LANES,
    broadcast,
    call,
    constant,
    int64,
    load_vector,
    none,
    operation,
    store,
    store_vector,
)
from tokenmill.ops.cpu.tiles import emit_cases
from tokenmill.ops.cpu.vector_math import f32, transposed

TILE_STRIDE: Final = 4 * GROUP_SIZE
"""Bytes from token to token in a tile."""

TILE_BYTES: Final = MAX_PANEL_WIDTH * TILE_STRIDE
ALIGNMENT: Final = 64


@operation(int64)
def tile_memory(builder: ir.IRBuilder) -> ir.Value:
    """Address of `TILE_BYTES` in the function's stack memory; the same in every call from one place."""
    with builder.goto_entry_block():
        memory = builder.alloca(ir.ArrayType(I8, TILE_BYTES + ALIGNMENT))
    address = builder.add(builder.ptrtoint(memory, I64), I64(ALIGNMENT - 1))
    return builder.and_(address, I64(-ALIGNMENT))


@device
def clear_tile(tile: int) -> None:
    """All zero: for tokens that the panel lacks, and columns beyond the last one."""
    for offset in range(0, TILE_BYTES, 4 * LANES):
        store(tile + offset, broadcast(0.0))


@operation(none, int64, int64, int64)
def store_panel_group(builder: ir.IRBuilder, record: ir.Value, width: ir.Value, tile: ir.Value) -> None:
    """Quantize a tile to the record of a panel of 4, 8 or 16 tokens."""
    columns = []
    for first in range(0, GROUP_SIZE, LANES):
        rows = [
            load_vector(builder, builder.add(tile, I64(token * TILE_STRIDE + 4 * first)), ir.FloatType(), align=4)
            for token in range(LANES)
        ]
        columns += transposed(builder, rows)
    magnitudes = [call(builder, "llvm.fabs.v16f32", F32X16, column) for column in columns]
    while len(magnitudes) > 1:
        magnitudes = [_larger(builder, a, b) for a, b in zip(magnitudes[::2], magnitudes[1::2], strict=True)]
    largest = magnitudes[0]
    scale = builder.fdiv(largest, f32(127.0))
    is_positive = builder.fcmp_ordered(">", largest, f32(0.0))
    inverse = builder.select(is_positive, builder.fdiv(f32(127.0), largest), f32(0.0))
    integers = []
    for column in columns:
        rounded = call(builder, "llvm.rint.v16f32", F32X16, builder.fmul(column, inverse))
        integers.append(builder.fptosi(rounded, I32X16))
    sums = integers
    while len(sums) > 1:
        sums = [builder.add(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
    total = builder.fmul(scale, builder.sitofp(sums[0], F32X16))
    words = [_word(builder, integers[first : first + 4]) for first in range(0, GROUP_SIZE, 4)]
    cases = {count: partial(_store, builder, record, count, [*words, scale, total]) for count in (4, 8, 16)}
    emit_cases(builder, width, cases)


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _word(builder: ir.IRBuilder, integers: list[ir.Value]) -> ir.Value:
    """Four signed bytes in each lane, the first one lowest."""
    word = builder.and_(integers[0], constant(I32, 255))
    for index, integer in enumerate(integers[1:], start=1):
        byte = builder.and_(integer, constant(I32, 255)) if index < 3 else integer
        word = builder.or_(word, builder.shl(byte, constant(I32, 8 * index)))
    return word


def _store(builder: ir.IRBuilder, record: ir.Value, width: int, vectors: list[ir.Value]) -> None:
    """Write the first `width` lanes of all vectors, one after the other."""
    lanes = ir.Constant(ir.VectorType(I32, width), [*range(width)])
    for index, vector in enumerate(vectors):
        kept = builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), lanes)
        store_vector(builder, builder.add(record, I64(4 * width * index)), kept)
