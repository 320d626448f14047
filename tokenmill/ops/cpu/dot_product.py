"""Writes LLVM code for sums of products of unsigned and signed bytes, in the ways that CPUs have for it.

Used by the int8 linear kernels, whose accumulators must stay in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from llvmlite import ir

from tokenmill.ops.cpu.cpu_features import DotProduct
from tokenmill.ops.cpu.simd import F32X16, I32, I32X16, I64, call, constant, declare, splat

I32X8: Final = ir.VectorType(I32, 8)
I16X16: Final = ir.VectorType(ir.IntType(16), 16)
I8X32: Final = ir.VectorType(ir.IntType(8), 32)
READ, NEAR, DATA = 0, 3, 1  # of llvm.prefetch

LARGEST_PAIR: Final = 2 * 127
"""Two neighbouring products are at most this often the largest weight."""


class Writer:
    """Writes LLVM code for one way to compute dot products; addresses are int64 values plus constant offsets."""

    def __init__(self, builder: ir.IRBuilder, way: DotProduct) -> None:
        self.builder = builder
        self.way = way

    def load(self, kind: ir.Type, address: ir.Value, offset: int = 0) -> ir.Value:
        """A value or vector at address + offset."""
        place = self.builder.add(address, I64(offset)) if offset else address
        return self.builder.load(self.builder.inttoptr(place, kind.as_pointer()), align=1)

    def store(self, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
        """Write a value or vector at address + offset."""
        place = self.builder.add(address, I64(offset)) if offset else address
        self.builder.store(value, self.builder.inttoptr(place, value.type.as_pointer()), align=1)

    def prefetch(self, address: ir.Value, offset: int) -> None:
        """Start to read a cache line, which need not exist."""
        place = self.builder.inttoptr(self.builder.add(address, I64(offset)), ir.IntType(8).as_pointer())
        function = declare(self.builder, "llvm.prefetch.p0", ir.VoidType(), [place.type, I32, I32, I32])
        self.builder.call(function, [place, I32(READ), I32(NEAR), I32(DATA)])

    def load_splat(self, kind: ir.Type, address: ir.Value, offset: int) -> ir.Value:
        """The value at address + offset in all 16 lanes."""
        return splat(self.builder, self.load(kind, address, offset))

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c."""
        return call(self.builder, "llvm.fmuladd.v16f32", F32X16, a, b, c)


class DotSum:
    """A sum in the making: in each of 16 lanes, products of 4 unsigned weights and 4 signed values at a time.

    Args:
        writer: of the code.
        bits: of a weight. With AVX2, sums of small weights stay in 16 bits while they cannot overflow.
        start: <16 x i32> to add to; default: zero.
    """

    def __init__(self, writer: Writer, bits: int, start: ir.Value | None = None) -> None:
        self._writer = writer
        self._total = constant(I32, 0) if start is None else start
        self._small: list[ir.Value] = []  # two halves of 16 sums of pairs
        self._num_small = 0
        self._max_small = (1 << 15) // ((1 << bits) * LARGEST_PAIR) if writer.way == DotProduct.AVX2 else 0

    def add(self, weights: ir.Value, values: ir.Value) -> None:
        """Add products of the bytes of two <16 x i32>; values are from -127 to 127."""
        builder, way = self._writer.builder, self._writer.way
        if way == DotProduct.AVX512_VNNI:
            self._total = call(builder, "llvm.x86.avx512.vpdpbusd.512", I32X16, self._total, weights, values)
        elif way == DotProduct.AVX_VNNI:
            parts = zip(*(_halves(builder, part) for part in (self._total, weights, values)), strict=True)
            halves = [call(builder, "llvm.x86.avx512.vpdpbusd.256", I32X8, *part) for part in parts]
            self._total = _join(builder, halves)
        elif way == DotProduct.PORTABLE:
            for byte in range(4):
                weight = builder.and_(builder.lshr(weights, constant(I32, 8 * byte)), constant(I32, 255))
                value = builder.ashr(builder.shl(values, constant(I32, 24 - 8 * byte)), constant(I32, 24))
                self._total = builder.add(self._total, builder.mul(weight, value))
        elif self._max_small:
            self._add_small(weights, values)
        else:
            self._add_wide(weights, values)

    def result(self) -> ir.Value:
        """<16 x i32>."""
        self._widen()
        return self._total

    def _add_small(self, weights: ir.Value, values: ir.Value) -> None:
        builder = self._writer.builder
        pairs = zip(_halves(builder, weights), _halves(builder, values), strict=True)
        bytes_of = [[builder.bitcast(half, I8X32) for half in pair] for pair in pairs]
        products = [call(builder, "llvm.x86.avx2.pmadd.ub.sw", I16X16, *pair) for pair in bytes_of]
        if self._small:
            products = [builder.add(*both) for both in zip(self._small, products, strict=True)]
        self._small = products
        self._num_small += 1
        if self._num_small == self._max_small:
            self._widen()

    def _widen(self) -> None:
        if not self._small:
            return
        builder, ones = self._writer.builder, ir.Constant(I16X16, [1] * 16)
        wide = [call(builder, "llvm.x86.avx2.pmadd.wd", I32X8, half, ones) for half in self._small]
        self._total = builder.add(self._total, _join(builder, wide))
        self._small, self._num_small = [], 0

    def _add_wide(self, weights: ir.Value, values: ir.Value) -> None:
        builder, eight = self._writer.builder, ir.Constant(I16X16, [8] * 16)
        sums = []
        for half, value in zip(_halves(builder, weights), _halves(builder, values), strict=True):
            weight, pair = builder.bitcast(half, I16X16), builder.bitcast(value, I16X16)
            even = builder.and_(weight, ir.Constant(I16X16, [255] * 16)), builder.ashr(builder.shl(pair, eight), eight)
            odd = builder.lshr(weight, eight), builder.ashr(pair, eight)
            products = [call(builder, "llvm.x86.avx2.pmadd.wd", I32X8, *part) for part in (even, odd)]
            sums.append(builder.add(*products))
        self._total = builder.add(self._total, _join(builder, sums))


def _halves(builder: ir.IRBuilder, value: ir.Value) -> list[ir.Value]:
    """Lanes 0-7 and 8-15."""
    undefined = ir.Constant(value.type, ir.Undefined)
    return [
        builder.shuffle_vector(value, undefined, ir.Constant(I32X8, list(range(first, first + 8)))) for first in (0, 8)
    ]


def _join(builder: ir.IRBuilder, halves: Sequence[ir.Value]) -> ir.Value:
    """16 lanes of two times 8."""
    return builder.shuffle_vector(*halves, ir.Constant(I32X16, list(range(16))))


class Loop:
    """`for index in range(count)` with values carried from turn to turn; count >= 1.

    The body is written after the constructor returns, which positions the builder in it; `close` ends it.
    """

    def __init__(self, builder: ir.IRBuilder, count: ir.Value, start: Sequence[ir.Value]) -> None:
        self._builder, self._count = builder, count
        before = builder.block
        self._body = builder.append_basic_block("turn")
        builder.branch(self._body)
        builder.position_at_end(self._body)
        self._index = builder.phi(I64)
        self._index.add_incoming(I64(0), before)
        self.carried = [builder.phi(value.type) for value in start]
        for phi, value in zip(self.carried, start, strict=True):
            phi.add_incoming(value, before)

    def close(self, following: Sequence[ir.Value]) -> None:
        """End the body, where the carried values become `following`."""
        builder = self._builder
        turn = builder.add(self._index, I64(1))
        end = builder.block
        self._index.add_incoming(turn, end)
        for phi, value in zip(self.carried, following, strict=True):
            phi.add_incoming(value, end)
        after = builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed("<", turn, self._count), self._body, after)
        builder.position_at_end(after)
