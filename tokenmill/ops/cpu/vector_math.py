"""Functions of vectors: exponential, tanh, activations, masks of scores, transposition. For kernels.

Errors are in units in the last place (ulp) against float64, measured by `tests/ops/cpu/test_vector_math.py`.
"""

from __future__ import annotations

import math
from typing import Final

from llvmlite import ir

from tokenmill.ops.cpu.simd import (
    F32,
    F32X16,
    I32,
    I32X16,
    I64,
    LANES,
    call,
    constant,
    float32,
    float32x16,
    int32x16,
    int64,
    load_vector,
    none,
    operation,
    splat,
    store_vector,
)

LOG2_E: Final = math.log2(math.e)
LN_2_HIGH: Final = 0.693359375  # few bits: its product with a small whole number is exact
LN_2_LOW: Final = math.log(2.0) - LN_2_HIGH

# Best relative fit of 2^r by a polynomial for |r| <= 1/2 (Remez), error 1.9e-9.
EXP2_COEFFICIENTS: Final = (
    1.0000000005541665,
    0.6931472057372671,
    0.24022646890633995,
    0.05550328776965695,
    0.009618488957132269,
    0.0013399931219175304,
    0.0001534581199893563,
)
TANH_COEFFICIENTS: Final = (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835)
"""Taylor series of tanh(x) / x in x^2: for small x, where the exponential would lose digits."""

SINE_COEFFICIENTS: Final = tuple((-1) ** i / math.factorial(2 * i + 1) for i in range(6))
COSINE_COEFFICIENTS: Final = tuple((-1) ** i / math.factorial(2 * i) for i in range(7))
"""Taylor series of sin(x) / x and cos(x) in x^2: below 1e-9 off for |x| <= pi / 4."""


def f32(value: float) -> ir.Constant:
    """All lanes `value`, rounded to float32."""
    return constant(F32, value)


def emit_fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c."""
    return call(builder, "llvm.fmuladd.v16f32", F32X16, a, b, c)


def emit_polynomial(builder: ir.IRBuilder, x: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
    """Sum of coefficients[i] x^i."""
    result: ir.Value = f32(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = emit_fma(builder, result, x, f32(coefficient))
    return result


def emit_clamp(builder: ir.IRBuilder, x: ir.Value, low: float, high: float) -> ir.Value:
    """x within bounds; not-a-number stays."""
    x = builder.select(builder.fcmp_ordered("<", x, f32(low)), f32(low), x)
    return builder.select(builder.fcmp_ordered(">", x, f32(high)), f32(high), x)


def emit_times_power_of_two(builder: ir.IRBuilder, x: ir.Value, exponent: ir.Value) -> ir.Value:
    """x * 2^exponent for x near 1 and whole exponents from -125 to 127."""
    shift = builder.shl(builder.fptosi(exponent, I32X16), constant(I32, 23))
    return builder.bitcast(builder.add(builder.bitcast(x, I32X16), shift), F32X16)


def emit_exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x for x clamped to [-86.5, 88]."""
    x = emit_clamp(builder, x, -86.5, 88.0)
    exponent = call(builder, "llvm.rint.v16f32", F32X16, builder.fmul(x, f32(LOG2_E)))
    rest = emit_fma(builder, exponent, f32(-LN_2_HIGH), x)
    rest = emit_fma(builder, exponent, f32(-LN_2_LOW), rest)
    power = emit_polynomial(builder, builder.fmul(rest, f32(LOG2_E)), EXP2_COEFFICIENTS)
    return emit_times_power_of_two(builder, power, exponent)


def emit_tanh(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """tanh(x)."""
    power = emit_exp(builder, builder.fadd(x, x))
    large = builder.fsub(f32(1.0), builder.fdiv(f32(2.0), builder.fadd(power, f32(1.0))))
    small = builder.fmul(x, emit_polynomial(builder, builder.fmul(x, x), TANH_COEFFICIENTS))
    is_small = builder.fcmp_ordered("<", call(builder, "llvm.fabs.v16f32", F32X16, x), f32(0.3))
    return builder.select(is_small, small, large)


@operation(float32x16, float32x16)
def exp2_negative(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2^x for x <= 0, at most 2 ulp; 2^-125, which is as good as 0, below -125 and for -inf."""
    x = builder.select(builder.fcmp_ordered(">", f32(-125.0), x), f32(-125.0), x)
    exponent = call(builder, "llvm.rint.v16f32", F32X16, x)
    power = emit_polynomial(builder, builder.fsub(x, exponent), EXP2_COEFFICIENTS)
    return emit_times_power_of_two(builder, power, exponent)


@operation(int32x16, float32x16, float32x16)
def probability_pairs(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """Numbers that are not negative as pairs of bfloat16, low in the low bits; halves are rounded up."""
    half = constant(I32, 0x8000)
    low_bits = builder.lshr(builder.add(builder.bitcast(low, I32X16), half), constant(I32, 16))
    high_bits = builder.and_(builder.add(builder.bitcast(high, I32X16), half), constant(I32, 0xFFFF0000))
    return builder.or_(low_bits, high_bits)


@operation(float32x16, float32x16)
def exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x, at most 2 ulp; x is clamped to [-86.5, 88]."""
    return emit_exp(builder, x)


@operation(float32x16, float32x16)
def tanh(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """tanh(x), at most 6 ulp."""
    return emit_tanh(builder, x)


@operation(float32x16, float32x16)
def silu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x / (1 + e^-x), at most 3 ulp above -80."""
    return builder.fdiv(x, builder.fadd(f32(1.0), emit_exp(builder, builder.fsub(f32(0.0), x))))


@operation(float32x16, float32x16)
def gelu_tanh(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as x times the logistic function of twice the argument."""
    factor = -2.0 * math.sqrt(2.0 / math.pi)
    inner = emit_fma(builder, builder.fmul(x, x), f32(factor * 0.044715), f32(factor))
    return builder.fdiv(x, builder.fadd(f32(1.0), emit_exp(builder, builder.fmul(inner, x))))


@operation(float32x16, float32x16, float32)
def soft_cap(builder: ir.IRBuilder, x: ir.Value, cap: ir.Value) -> ir.Value:
    """cap tanh(x / cap)."""
    limit = splat(builder, cap)
    return builder.fmul(emit_tanh(builder, builder.fdiv(x, limit)), limit)


@operation(float32x16, float32x16, int32x16, int64, int64, float32)
def keep_visible(
    builder: ir.IRBuilder,
    scores: ir.Value,
    query_positions: ir.Value,
    key_position: ir.Value,
    window: ir.Value,
    other: ir.Value,
) -> ir.Value:
    """Scores of one key for 16 queries; `other` where the key comes after the query, or `window` or more before."""
    distance = builder.sub(query_positions, splat(builder, builder.trunc(key_position, I32)))
    is_past = builder.icmp_signed(">=", distance, constant(I32, 0))
    is_near = builder.icmp_signed("<", distance, splat(builder, builder.trunc(window, I32)))
    return builder.select(builder.and_(is_past, is_near), scores, splat(builder, other))


def transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """16 rows of 16 lanes as columns, by perfect shuffles."""
    half = LANES // 2
    low, high = ([lane for pair in range(half) for lane in (first + pair, first + pair + LANES)] for first in (0, half))
    for _ in range(LANES.bit_length() - 1):
        rows = [
            builder.shuffle_vector(rows[row], rows[row + half], ir.Constant(I32X16, lanes))
            for row in range(half)
            for lanes in (low, high)
        ]
    return rows


@operation(none, int64, int64, int64, int64)
def transpose_16x16(
    builder: ir.IRBuilder, source: ir.Value, source_stride: ir.Value, target: ir.Value, target_stride: ir.Value
) -> None:
    """16 rows of 16 values of 32 bits become columns; strides in bytes."""
    rows = [
        load_vector(builder, builder.add(source, builder.mul(source_stride, I64(row))), F32, align=4)
        for row in range(LANES)
    ]
    for row, vector in enumerate(transposed(builder, rows)):
        store_vector(builder, builder.add(target, builder.mul(target_stride, I64(row))), vector)


def emit_sine_and_cosine(builder: ir.IRBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """sin(x) and cos(x) for |x| below 2^30; the angle is reduced in float64."""
    double_type = ir.VectorType(ir.DoubleType(), LANES)
    wide = builder.fpext(x, double_type)
    scaled = builder.fmul(wide, constant(ir.DoubleType(), 2 / math.pi))
    quarter = call(builder, "llvm.rint.v16f64", double_type, scaled)
    rest = builder.fmul(builder.fsub(scaled, quarter), constant(ir.DoubleType(), math.pi / 2))
    rest = builder.fptrunc(rest, F32X16)
    square = builder.fmul(rest, rest)
    sine = builder.fmul(rest, emit_polynomial(builder, square, SINE_COEFFICIENTS))
    cosine = emit_polynomial(builder, square, COSINE_COEFFICIENTS)
    turns = builder.fptosi(quarter, I32X16)
    zero = constant(I32, 0)
    is_odd = builder.icmp_signed("!=", builder.and_(turns, constant(I32, 1)), zero)
    negates_sine = builder.icmp_signed("!=", builder.and_(turns, constant(I32, 2)), zero)
    negates_cosine = builder.icmp_signed(
        "!=", builder.and_(builder.add(turns, constant(I32, 1)), constant(I32, 2)), zero
    )
    results = []
    for chosen, negates in (
        (builder.select(is_odd, cosine, sine), negates_sine),
        (builder.select(is_odd, sine, cosine), negates_cosine),
    ):
        results.append(builder.select(negates, builder.fsub(f32(-0.0), chosen), chosen))
    return results[0], results[1]


@operation(float32x16, float32x16)
def sine(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """sin(x), within 1.5e-7."""
    return emit_sine_and_cosine(builder, x)[0]


@operation(float32x16, float32x16)
def cosine(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """cos(x), within 1.5e-7."""
    return emit_sine_and_cosine(builder, x)[1]
