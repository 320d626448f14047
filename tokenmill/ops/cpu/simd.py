"""Vectors of 16 lanes for native functions: `float32x16` and `int32x16`, with the operations that the kernels need.

The kernels of `ops/cpu/` write their inner loops with these, on memory given by addresses in bytes. LLVM lowers a
vector to whatever the processor has: one AVX-512 register, two of AVX2, four of SSE or NEON. A mask of lanes is the
number of lanes that count, from the first one on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

from llvmlite import ir

from tokenmill.ops.cpu.cpu_features import converts_half
from tokenmill.ops.cpu.native_types import LANES as LANES
from tokenmill.ops.cpu.native_types import Operation, Signature, Type
from tokenmill.ops.cpu.native_types import float32 as float32
from tokenmill.ops.cpu.native_types import float32x16 as float32x16
from tokenmill.ops.cpu.native_types import int32x16 as int32x16
from tokenmill.ops.cpu.native_types import int64 as int64
from tokenmill.ops.cpu.native_types import none as none

F32: Final = ir.FloatType()
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32X16: Final = ir.VectorType(F32, LANES)
I32X16: Final = ir.VectorType(I32, LANES)


Emit: TypeAlias = Callable[..., ir.Value | None]


def operation(result: Type, *parameters: Type) -> Callable[[Emit], Any]:
    """Make `emit(builder, *values)` an operation of native functions; numbers are converted to the types it takes."""

    def decorate(emit: Emit) -> Any:
        return Operation(emit.__name__, Signature(result, parameters), emit)

    return decorate


def declare(builder: ir.IRBuilder, name: str, result: ir.Type, parameters: list[ir.Type]) -> ir.Function:
    """An LLVM function of that name in the builder's module."""
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(result, parameters), name)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *values: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic."""
    return builder.call(declare(builder, name, result, [value.type for value in values]), values)


def splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """All lanes the same."""
    vector_type = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(vector_type, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(
        first, ir.Constant(vector_type, ir.Undefined), ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    )


def constant(element: ir.Type, value: float) -> ir.Constant:
    """A vector constant with all lanes the same."""
    return ir.Constant(ir.VectorType(element, LANES), [value] * LANES)


def load_vector(builder: ir.IRBuilder, address: ir.Value, element: ir.Type, align: int = 1) -> ir.Value:
    """16 elements at an address."""
    pointer = builder.inttoptr(address, ir.VectorType(element, LANES).as_pointer())
    return builder.load(pointer, align=align)


def store_vector(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Write 16 elements at an address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def extend_half(builder: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """float16, one or a vector, as float32. Without an instruction for it LLVM calls a function that is not there."""
    is_vector = isinstance(half.type, ir.VectorType)

    def like(element: ir.Type) -> ir.Type:
        return ir.VectorType(element, half.type.count) if is_vector else element

    def number(value: float, element: ir.Type = I32) -> ir.Constant:
        return ir.Constant(like(element), [value] * half.type.count if is_vector else value)

    if converts_half():
        return builder.fpext(half, like(F32))
    bits = builder.zext(builder.bitcast(half, like(I16)), like(I32))
    magnitude = builder.and_(bits, number(0x7FFF))
    shifted = builder.shl(magnitude, number(13))
    normal = builder.add(shifted, number(112 << 23))  # the exponent counts from -127 instead of -15
    small = builder.fmul(builder.uitofp(magnitude, like(F32)), number(2.0**-24, F32))
    result = builder.select(
        builder.icmp_unsigned("<", magnitude, number(0x400)), builder.bitcast(small, like(I32)), normal
    )
    is_infinite = builder.icmp_unsigned(">=", magnitude, number(0x7C00))  # or not a number
    result = builder.select(is_infinite, builder.or_(shifted, number(0x7F800000)), result)
    sign = builder.shl(builder.and_(bits, number(0x8000)), number(16))
    return builder.bitcast(builder.or_(result, sign), like(F32))


def lane_mask(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """<16 x i1>: lanes below `count`."""
    lanes = ir.Constant(I32X16, list(range(LANES)))
    return builder.icmp_signed("<", lanes, splat(builder, builder.trunc(count, I32)))


def load_masked(builder: ir.IRBuilder, address: ir.Value, element: ir.Type, count: ir.Value) -> ir.Value:
    """The first `count` of 16 elements at an address, the others zero; memory beyond is not touched."""
    vector_type = ir.VectorType(element, LANES)
    pointer = builder.inttoptr(address, vector_type.as_pointer())
    name = {F32: "f32", I32: "i32", I16: "i16", I8: "i8"}[element]
    function = declare(
        builder,
        f"llvm.masked.load.v16{name}.p0",
        vector_type,
        [pointer.type, I32, ir.VectorType(I1, LANES), vector_type],
    )
    zero = ir.Constant(vector_type, [0] * LANES)
    return builder.call(function, [pointer, I32(1), lane_mask(builder, count), zero])


def store_masked(builder: ir.IRBuilder, address: ir.Value, value: ir.Value, count: ir.Value) -> None:
    """Write the first `count` lanes."""
    pointer = builder.inttoptr(address, value.type.as_pointer())
    name = {F32: "f32", I32: "i32", I16: "i16", I8: "i8"}[value.type.element]
    function = declare(
        builder,
        f"llvm.masked.store.v16{name}.p0",
        ir.VoidType(),
        [value.type, pointer.type, I32, ir.VectorType(I1, LANES)],
    )
    builder.call(function, [value, pointer, I32(1), lane_mask(builder, count)])


# Scalars in memory.


@operation(float32, int64)
def load_f32(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The float32 at an address."""
    return builder.load(builder.inttoptr(address, F32.as_pointer()), align=4)


@operation(none, int64, float32)
def store_f32(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Write a float32."""
    builder.store(value, builder.inttoptr(address, F32.as_pointer()), align=4)


@operation(int64, int64)
def load_i32(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The int32 at an address."""
    return builder.sext(builder.load(builder.inttoptr(address, I32.as_pointer()), align=4), I64)


# Vectors in memory.


@operation(float32x16, int64)
def load(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """16 float32 at an address."""
    return load_vector(builder, address, F32)


@operation(none, int64, float32x16)
def store(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Write 16 float32."""
    store_vector(builder, address, value)


@operation(float32x16, int64, int64)
def load_first(builder: ir.IRBuilder, address: ir.Value, count: ir.Value) -> ir.Value:
    """`count` float32 at an address, and zeros."""
    return load_masked(builder, address, F32, count)


@operation(none, int64, float32x16, int64)
def store_first(builder: ir.IRBuilder, address: ir.Value, value: ir.Value, count: ir.Value) -> None:
    """Write the first `count` lanes as float32."""
    store_masked(builder, address, value, count)


@operation(int32x16, int64)
def load_ints(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """16 int32 at an address."""
    return load_vector(builder, address, I32)


@operation(none, int64, int32x16)
def store_ints(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Write 16 int32."""
    store_vector(builder, address, value)


# Arithmetic.


@operation(float32x16, float32)
def broadcast(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """All lanes `value`."""
    return splat(builder, value)


@operation(float32x16, float32x16, float32x16)
def add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """a + b."""
    return builder.fadd(a, b)


@operation(float32x16, float32x16, float32x16)
def subtract(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """a - b."""
    return builder.fsub(a, b)


@operation(float32x16, float32x16, float32x16)
def multiply(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """a * b."""
    return builder.fmul(a, b)


@operation(float32x16, float32x16, float32x16)
def divide(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """a / b."""
    return builder.fdiv(a, b)


@operation(float32x16, float32x16, float32x16, float32x16)
def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c, with one rounding where the processor can."""
    return call(builder, "llvm.fmuladd.v16f32", F32X16, a, b, c)


@operation(float32x16, float32x16, float32x16)
def maximum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """The larger of each lane; b where one is not a number."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@operation(float32x16, float32x16, float32x16)
def minimum(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """The smaller of each lane; b where one is not a number."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@operation(float32x16, float32x16)
def absolute(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """|a|."""
    return call(builder, "llvm.fabs.v16f32", F32X16, a)


@operation(float32x16, float32x16)
def round_even(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """The nearest whole number, the even one of two."""
    return call(builder, "llvm.rint.v16f32", F32X16, a)


@operation(float32x16, float32x16, int64, int64, float32)
def keep_lanes(builder: ir.IRBuilder, a: ir.Value, first: ir.Value, end: ir.Value, other: ir.Value) -> ir.Value:
    """Lanes `first` to `end - 1` of a; `other` elsewhere, whatever a holds there."""
    inside = builder.and_(lane_mask(builder, end), builder.not_(lane_mask(builder, first)))
    return builder.select(inside, a, splat(builder, other))


@operation(float32, float32x16)
def reduce_add(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """Sum of the lanes, as a tree."""
    return reduce_tree(builder, a, builder.fadd)


@operation(float32, float32x16)
def reduce_max(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """Largest lane."""
    return reduce_tree(builder, a, lambda x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))


def reduce_tree(builder: ir.IRBuilder, a: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """Combine halves until one lane is left: the same order on every processor."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = ([*range(width)], [*range(width, 2 * width)])
        undefined = ir.Constant(a.type, ir.Undefined)
        index_type = ir.VectorType(I32, width)
        a = combine(
            builder.shuffle_vector(a, undefined, ir.Constant(index_type, low)),
            builder.shuffle_vector(a, undefined, ir.Constant(index_type, high)),
        )
    return builder.extract_element(a, I32(0))


# bfloat16.


def bfloat16_bits(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """<16 x i32>: bits of the nearest bfloat16, the even one of two; not-a-number stays one."""
    bits = builder.bitcast(a, I32X16)
    odd = builder.and_(builder.lshr(bits, constant(I32, 16)), constant(I32, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, odd), constant(I32, 0x7FFF)), constant(I32, 16))
    is_nan = builder.fcmp_unordered("uno", a, a)
    return builder.select(is_nan, constant(I32, 0x7FC0), rounded)


@operation(int32x16, float32x16, float32x16)
def bfloat16_pairs(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """Each lane of `low` and `high` rounded to bfloat16, low in the low bits."""
    return builder.or_(bfloat16_bits(builder, low), builder.shl(bfloat16_bits(builder, high), constant(I32, 16)))


@operation(none, int64, float32x16)
def store_bfloat16(builder: ir.IRBuilder, address: ir.Value, a: ir.Value) -> None:
    """Write 16 bfloat16."""
    store_vector(builder, address, builder.trunc(bfloat16_bits(builder, a), ir.VectorType(I16, LANES)))
