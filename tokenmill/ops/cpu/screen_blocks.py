"""Inner loops of the screen of an output head (see `head_screen.py`), written as LLVM code as those of `linear_blocks`.

The screen of a weight is tiles of 16 rows, one after the other. A tile is its groups of 32 columns, then the low halves
of the exact columns, which are chosen in quads of 4:

| part of a group | content |
|---|---|
| scales | 16 rows of float16, as in the packed weight |
| errors | 16 rows of uint8: `ERROR_STEPS` times the norm of what the high halves leave out, rounded up |
| high halves | 4 vectors of 64 bytes: of vector i of the packed weight in the low, of i + 4 in the high half of bytes |

A vector behind the groups has the low halves of one exact quad in the low, and of the next one in the high half of its
bytes. A value v (0 to 255) counts as 16 (v / 16) + 7.5, unless its column is exact.
"""

from __future__ import annotations

from typing import Final

from llvmlite import ir

from tokenmill.ops.cpu.cpu_features import DotProduct
from tokenmill.ops.cpu.dot_product import DotSum, Loop, Writer
from tokenmill.ops.cpu.layout import GROUP_BYTES
from tokenmill.ops.cpu.linear_blocks import F16X16, STEPS, VECTOR_BYTES
from tokenmill.ops.cpu.native_types import int64, literal, none
from tokenmill.ops.cpu.packing import ENCODINGS, ROW_BLOCK
from tokenmill.ops.cpu.simd import F32, F32X16, I8, I32, I32X16, I64, call, constant, extend_half, operation

ERRORS: Final = 2 * ROW_BLOCK  # behind the scales
HALVES: Final = ERRORS + ROW_BLOCK
SCREEN_GROUP_BYTES: Final = HALVES + STEPS // 2 * VECTOR_BYTES
QUAD_BYTES: Final = VECTOR_BYTES // 2

HALF_BITS: Final = 4
LOW_HALVES: Final = 0x0F0F0F0F
MIDDLE: Final = 7.5
"""What stands for the low half of a value."""

ERROR_STEPS: Final = 6.0
"""The largest norm, 7.5 sqrt(32), is 254.6 of them."""

# What is prepared of a token for each group: float32. `GROUP_SCALE` is 16 times that of the activations.
GROUP_SCALE: Final = 0
GROUP_SHIFT: Final = 4  # the part of the logit that all values have in common, without the weight's scale
GROUP_ERROR: Final = 8  # bound of the error for one step of the weight's norm
GROUP_SLACK: Final = 12  # bound of the rounding errors
GROUP_PREPARED: Final = 16

# And for each exact quad.
QUAD_OFFSET: Final = 0  # int64, where in a tile its group is
QUAD_VALUES: Final = 8  # 4 int8 values
QUAD_SCALE: Final = 12  # float32
QUAD_SHIFT: Final = 16  # float32
QUAD_PREPARED: Final = 24

AHEAD: Final = 4096
"""Bytes ahead that are fetched: a group has so few that a core does not look far enough ahead by itself. With 18.6 MB
and 45 GB/s the search takes 0.40 ms so, and 0.55 without."""

TINY: Final = 1e-30
"""More than all numbers that are so small that they count as zero add up to."""


def halves_of(writer: Writer, vector: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The low and the high half of each byte."""
    builder, mask = writer.builder, constant(I32, LOW_HALVES)
    return builder.and_(vector, mask), builder.and_(builder.lshr(vector, constant(I32, HALF_BITS)), mask)


def joined(writer: Writer, low: ir.Value, high: ir.Value) -> ir.Value:
    """Bytes below 16 as the halves of one byte."""
    return writer.builder.or_(low, writer.builder.shl(high, constant(I32, HALF_BITS)))


@operation(none, literal, *[int64] * 7)
def screen_tile(
    builder: ir.IRBuilder,
    way: int,
    tile: ir.Value,
    values: ir.Value,
    groups: ir.Value,
    num_groups: ir.Value,
    quads: ir.Value,
    num_quads: ir.Value,
    result: ir.Value,
) -> None:
    """Approximate logits of 16 rows, and bounds of their errors: 2 x 16 float32 to `result`.

    Args:
        way: known when the kernel is compiled.
        tile: address of the tile.
        values: address of the token's activations.
        groups, quads: addresses of what is prepared of the token.
        num_quads: a multiple of 2, at least 2.
    """
    writer = Writer(builder, DotProduct(way))
    logits, bounds = constant(F32, 0.0), constant(F32, TINY)
    loop = Loop(builder, num_groups, [tile, values, groups, logits, bounds])
    group, token, prepared, logits, bounds = loop.carried
    for line in range(0, SCREEN_GROUP_BYTES, VECTOR_BYTES):
        writer.prefetch(group, AHEAD + line)
    vectors = [writer.load(I32X16, group, HALVES + VECTOR_BYTES * index) for index in range(STEPS // 2)]
    halves = [halves_of(writer, vector) for vector in vectors]
    total = DotSum(writer, HALF_BITS)
    for step, weights in enumerate([low for low, _ in halves] + [high for _, high in halves]):
        total.add(weights, writer.load_splat(I32, token, 4 * step))
    scales = extend_half(builder, writer.load(F16X16, group))
    logits = _add(writer, logits, scales, total, prepared, (GROUP_SCALE, GROUP_SHIFT))
    errors = builder.uitofp(writer.load(ir.VectorType(I8, ROW_BLOCK), group, ERRORS), F32X16)
    slack = writer.load_splat(F32, prepared, GROUP_SLACK)
    error = writer.fma(errors, writer.load_splat(F32, prepared, GROUP_ERROR), slack)
    bounds = writer.fma(call(builder, "llvm.fabs.v16f32", F32X16, scales), error, bounds)
    ends = [builder.add(group, I64(SCREEN_GROUP_BYTES)), builder.add(token, I64(GROUP_BYTES))]
    loop.close([*ends, builder.add(prepared, I64(GROUP_PREPARED)), logits, bounds])

    pairs = Loop(builder, builder.lshr(num_quads, I64(1)), [ends[0], quads, logits])
    place, prepared, logits = pairs.carried
    writer.prefetch(place, AHEAD)
    for half in halves_of(writer, writer.load(I32X16, place)):
        total = DotSum(writer, HALF_BITS)
        total.add(half, writer.load_splat(I32, prepared, QUAD_VALUES))
        offset = builder.add(tile, writer.load(I64, prepared, QUAD_OFFSET))
        scales = extend_half(builder, writer.load(F16X16, offset))
        logits = _add(writer, logits, scales, total, prepared, (QUAD_SCALE, QUAD_SHIFT))
        prepared = builder.add(prepared, I64(QUAD_PREPARED))
    pairs.close([builder.add(place, I64(VECTOR_BYTES)), prepared, logits])
    writer.store(logits, result)
    writer.store(bounds, result, VECTOR_BYTES)


def _add(
    writer: Writer,
    logits: ir.Value,
    scales: ir.Value,
    total: DotSum,
    prepared: ir.Value,
    offsets: tuple[int, int],
) -> ir.Value:
    """logits + scales * (total * scale + shift), where scale and shift of the token are prepared."""
    scale, shift = (writer.load_splat(F32, prepared, offset) for offset in offsets)
    return writer.fma(scales, writer.fma(writer.builder.sitofp(total.result(), F32X16), scale, shift), logits)


@operation(none, literal, literal, *[int64] * 4)
def pack_group(
    builder: ir.IRBuilder,
    encoding: int,
    way: int,
    source: ir.Value,
    target: ir.Value,
    masks: ir.Value,
    constants: ir.Value,
) -> None:
    """Write a group of a tile.

    Args:
        encoding, way: known when the kernel is compiled.
        source: address of the group in the packed weight.
        masks: address of int32 [8], `LOW_HALVES` for each quad of the group that is not exact, else 0.
        constants: address of float32, the number of columns that are not exact times the square of `MIDDLE`.
    """
    writer, offset = Writer(builder, DotProduct(way)), ENCODINGS[encoding].values_offset
    vectors = [writer.load(I32X16, source, offset + VECTOR_BYTES * step) for step in range(STEPS)]
    squares, sums = DotSum(writer, HALF_BITS), DotSum(writer, HALF_BITS)
    for step, vector in enumerate(vectors):
        low = builder.and_(vector, writer.load_splat(I32, masks, 4 * step))
        squares.add(low, low)
        sums.add(low, constant(I32, 0x01010101))
    # Sum of (low - 7.5)^2, of whole numbers and quarters: exact.
    whole = builder.sub(squares.result(), builder.mul(sums.result(), constant(I32, 15)))
    square = builder.fadd(builder.sitofp(whole, F32X16), writer.load_splat(F32, constants, 0))
    norm = call(builder, "llvm.sqrt.v16f32", F32X16, square)
    steps = builder.fptosi(builder.fmul(norm, constant(F32, ERROR_STEPS)), I32X16)
    errors = builder.trunc(builder.add(steps, constant(I32, 1)), ir.VectorType(I8, ROW_BLOCK))
    writer.store(writer.load(F16X16, source), target)
    writer.store(errors, target, ERRORS)
    for index in range(STEPS // 2):
        _, low = halves_of(writer, vectors[index])
        _, high = halves_of(writer, vectors[index + STEPS // 2])
        writer.store(joined(writer, low, high), target, HALVES + VECTOR_BYTES * index)


@operation(none, int64, int64, int64)
def pack_quads(builder: ir.IRBuilder, first: ir.Value, second: ir.Value, target: ir.Value) -> None:
    """Write the low halves of two quads, whose vectors of the packed weight are at these addresses."""
    writer = Writer(builder, DotProduct.PORTABLE)
    low, high = (halves_of(writer, writer.load(I32X16, place))[0] for place in (first, second))
    writer.store(joined(writer, low, high), target)
