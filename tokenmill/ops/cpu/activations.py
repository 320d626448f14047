"""Writing of `int8_group32` activations (see `layout.py`) from kernels, a group of a token at a time."""

from __future__ import annotations

from llvmlite import ir

from tokenmill.ops.cpu.jit import device
from tokenmill.ops.cpu.layout import GROUP_BYTES, GROUP_SIZE
from tokenmill.ops.cpu.simd import (
    I32,
    I32X16,
    I64,
    LANES,
    absolute,
    broadcast,
    float32,
    float32x16,
    int64,
    maximum,
    multiply,
    none,
    operation,
    reduce_add,
    reduce_max,
    round_even,
    store_f32,
)

I8X16 = ir.VectorType(ir.IntType(8), LANES)
I32X4 = ir.VectorType(I32, 4)


@operation(none, int64, int64, float32x16)
def store_words(builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, values: ir.Value) -> None:
    """Write 16 whole numbers from -128 to 127 as int8, in 4 words of 4 bytes that lie `stride` bytes apart."""
    words = builder.bitcast(builder.trunc(builder.fptosi(values, I32X16), I8X16), I32X4)
    for index in range(4):
        place = builder.add(address, builder.mul(stride, I64(index)))
        builder.store(builder.extract_element(words, I32(index)), builder.inttoptr(place, I32.as_pointer()), align=4)


@device
def group_address(buffer: int, num_groups: int, width: int, token: int, group: int) -> int:
    """The record of a token's panel and a group, in a buffer with `num_groups` groups and panels of `width` tokens."""
    return buffer + (token // width * num_groups + group) * (GROUP_BYTES * width)


@device
def store_group(record: int, width: int, lane: int, low, high):  # type: ignore[no-untyped-def]
    """Quantize a group of a token: columns 0-15 `low` and 16-31 `high`, float32x16.

    Args:
        record: address of the record.
        width: tokens of the panel.
        lane: the token in its panel.
    """
    largest = reduce_max(maximum(absolute(low), absolute(high)))
    scale = largest / float32(127.0)
    inverse = float32(127.0) / largest if largest > 0 else float32(0.0)
    low = round_even(multiply(low, broadcast(inverse)))
    high = round_even(multiply(high, broadcast(inverse)))
    place = record + 4 * lane
    store_words(place, 4 * width, low)
    store_words(place + 16 * width, 4 * width, high)
    store_f32(place + GROUP_SIZE * width, scale)
    store_f32(place + (GROUP_SIZE + 4) * width, scale * (reduce_add(low) + reduce_add(high)))
