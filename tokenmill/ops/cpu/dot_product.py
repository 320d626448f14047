"""Inner loops of the int8 linear kernels, written as LLVM code so that all accumulators stay in registers.

`gemv_block` streams packed weights past one token, `panel_block` multiplies them with tokens of a panel. Both add up a
group of 32 columns in integers and then the groups in float32, in the same order and with the same operations: a
token's result does not depend on which of them computed it. The layout of packed weights is described in `packing.py`,
that of activations in `layout.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from tokenmill.ops.cpu.cpu_features import DotProduct
from tokenmill.ops.cpu.layout import GROUP_BYTES, GROUP_SIZE
from tokenmill.ops.cpu.packing import ENCODINGS, ROW_BLOCK, Encoding
from tokenmill.ops.cpu.simd import F32, F32X16, I32, I32X16, I64, call, constant, declare, splat

I16X16: Final = ir.VectorType(ir.IntType(16), 16)
F16X16: Final = ir.VectorType(ir.HalfType(), 16)
VECTOR_BYTES: Final = 64
READ, NEAR, DATA = 0, 3, 1  # of llvm.prefetch
STEPS: Final = GROUP_SIZE // 4
"""Dot products of 4 columns in a group."""


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

    def dot(self, total: ir.Value, weights: ir.Value, values: ir.Value) -> ir.Value:
        """Add to each of 16 lanes the 4 products of its unsigned bytes of `weights` and signed bytes of `values`."""
        builder = self.builder
        if self.way == DotProduct.AVX512_VNNI:
            return call(builder, "llvm.x86.avx512.vpdpbusd.512", I32X16, total, weights, values)
        if self.way == DotProduct.PORTABLE:
            for byte in range(4):
                weight = builder.and_(builder.lshr(weights, constant(I32, 8 * byte)), constant(I32, 255))
                value = builder.ashr(builder.shl(values, constant(I32, 24 - 8 * byte)), constant(I32, 24))
                total = builder.add(total, builder.mul(weight, value))
            return total
        halves = [self._half_dot(*(self._half(part, which) for part in (total, weights, values))) for which in (0, 1)]
        return builder.shuffle_vector(*halves, ir.Constant(I32X16, list(range(16))))

    def _half(self, value: ir.Value, which: int) -> ir.Value:
        lanes = ir.Constant(ir.VectorType(I32, 8), list(range(8 * which, 8 * which + 8)))
        return self.builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), lanes)

    def _half_dot(self, total: ir.Value, weights: ir.Value, values: ir.Value) -> ir.Value:
        builder, kind = self.builder, ir.VectorType(I32, 8)
        if self.way == DotProduct.AVX_VNNI:
            return call(builder, "llvm.x86.avx512.vpdpbusd.256", kind, total, weights, values)
        pairs = ir.VectorType(ir.IntType(16), 16)
        eight = ir.Constant(pairs, [8] * 16)
        weights, values = builder.bitcast(weights, pairs), builder.bitcast(values, pairs)
        even = builder.and_(weights, ir.Constant(pairs, [255] * 16)), builder.ashr(builder.shl(values, eight), eight)
        odd = builder.lshr(weights, eight), builder.ashr(values, eight)
        for part in (even, odd):
            total = builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", kind, *part))
        return total

    def halves_of_bytes(self, packed: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Low and high 4 bits of each byte."""
        mask = constant(I32, 0x0F0F0F0F)
        return (
            self.builder.and_(packed, mask),
            self.builder.and_(self.builder.lshr(packed, constant(I32, 4)), mask),
        )

    def group_weights(self, encoding: Encoding, group: ir.Value) -> list[ir.Value]:
        """The 8 vectors of unsigned weights of a packed group at an address."""
        offset = encoding.values_offset
        if encoding.bits == 8:
            return [self.load(I32X16, group, offset + VECTOR_BYTES * step) for step in range(STEPS)]
        packed = [self.load(I32X16, group, offset + VECTOR_BYTES * step) for step in range(STEPS // 2)]
        low, high = zip(*(self.halves_of_bytes(vector) for vector in packed), strict=True)
        return [*low, *high]

    def group_scales(self, encoding: Encoding, group: ir.Value) -> tuple[list[ir.Value], list[ir.Value]]:
        """Scales and minimums of the 16 rows of a packed group, for each scale group."""
        count, size = encoding.scales_per_group, encoding.scale_bytes * ROW_BLOCK
        if size == 0:
            return [constant(F32, 1.0)], [constant(F32, -float(encoding.zero_point))]
        scales = [self._load_float(encoding, group, size * index) for index in range(count)]
        if encoding.has_minimum:
            return scales, [self._load_float(encoding, group, size * (count + index)) for index in range(count)]
        shift = constant(F32, -float(encoding.zero_point))
        return scales, [self.builder.fmul(scale, shift) for scale in scales]

    def _load_float(self, encoding: Encoding, group: ir.Value, offset: int) -> ir.Value:
        if encoding.scale_bytes == 4:
            return self.load(F32X16, group, offset)
        return self.builder.fpext(self.load(F16X16, group, offset), F32X16)


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


@dataclass(frozen=True, slots=True)
class Activations:
    """Where a writer finds a group of activations of some tokens of a panel."""

    width: int  # tokens of the panel
    first: int  # token of the panel

    def values(self, step: int, token: int) -> int:
        """Offset of 4 columns of a token."""
        return (step * self.width + self.first + token) * 4

    def scale(self, token: int) -> int:
        """Offset of a token's scale."""
        return GROUP_SIZE * self.width + 4 * (self.first + token)

    def sum(self, token: int) -> int:
        """Offset of a token's product of scale and sum."""
        return self.scale(token) + 4 * self.width


def literal_values(arguments: Sequence[Any]) -> list[int] | None:
    """Numbers that are known when the kernel is compiled; None if one is not."""
    if not all(isinstance(argument, types.IntegerLiteral) for argument in arguments):
        return None
    return [argument.literal_value for argument in arguments]


def add_group(
    writer: Writer,
    total: ir.Value,
    sums: Sequence[ir.Value],
    scales: Sequence[ir.Value],
    minimums: Sequence[ir.Value],
    activation: tuple[ir.Value, Sequence[ir.Value]],
) -> ir.Value:
    """Add the integer sums of a group to the float32 total; the one place where floats meet."""
    scale, value_sums = activation
    for part, weight_scale, minimum, value_sum in zip(sums, scales, minimums, value_sums, strict=True):
        scaled = writer.builder.fmul(writer.builder.sitofp(part, F32X16), scale)
        total = writer.fma(weight_scale, scaled, total)
        total = writer.fma(minimum, value_sum, total)
    return total


def dot_steps(writer: Writer, count: int, weights: Sequence[ir.Value], values: Sequence[ir.Value]) -> list[ir.Value]:
    """Integer sums of a group for each of its `count` scale groups."""
    length = STEPS // count
    sums = []
    for first in range(0, STEPS, length):
        total = constant(I32, 0)
        for step in range(first, first + length):
            total = writer.dot(total, weights[step], values[step])
        sums.append(total)
    return sums


def half_sums(writer: Writer, values: Sequence[ir.Value], scale: ir.Value) -> list[ir.Value]:
    """Products of scale and sum for both halves of a group, which activations do not have."""
    ones = constant(I32, 0x01010101)
    sums = dot_steps(writer, 2, [ones] * STEPS, values)
    return [writer.builder.fmul(writer.builder.sitofp(part, F32X16), scale) for part in sums]


@intrinsic(prefer_literal=True)
def gemv_block(context: Any, encoding: Any, way: Any, weights: Any, values: Any, num_groups: Any, result: Any) -> Any:
    """Products of the 16 rows of a packed row block at `weights` and one token at `values`; 16 float32 to `result`."""
    numbers = literal_values((encoding, way))
    if numbers is None:
        return None
    layout, method = ENCODINGS[numbers[0]], DotProduct(numbers[1])
    activations = Activations(1, 0)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        writer = Writer(builder, method)
        weights, values, num_groups, result = arguments[2:]
        loop = Loop(builder, num_groups, [weights, values, constant(F32, 0.0)])
        group, token, total = loop.carried
        steps = [writer.load_splat(I32, token, activations.values(step, 0)) for step in range(STEPS)]
        sums = dot_steps(writer, layout.scales_per_group, writer.group_weights(layout, group), steps)
        scale = writer.load_splat(F32, token, activations.scale(0))
        value_sums = [writer.load_splat(F32, token, activations.sum(0))]
        if layout.scales_per_group == 2:
            value_sums = half_sums(writer, steps, scale)
        following = add_group(writer, total, sums, *writer.group_scales(layout, group), (scale, value_sums))
        loop.close([builder.add(group, I64(layout.group_bytes)), builder.add(token, I64(GROUP_BYTES)), following])
        writer.store(following, result)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(encoding, way, int64, int64, int64, int64), codegen


@intrinsic(prefer_literal=True)
def panel_block(
    context: Any,
    encoding: Any,
    way: Any,
    width: Any,
    first: Any,
    num_tokens: Any,
    num_blocks: Any,
    fetches: Any,
    weights: Any,
    block_bytes: Any,
    values: Any,
    num_groups: Any,
    result: Any,
    result_stride: Any,
) -> Any:
    """Add to `result` the products of row blocks and tokens `first` to `first + num_tokens - 1` of a panel.

    Args:
        encoding, way, width, first, num_tokens, num_blocks, fetches: known when the kernel is compiled.
        fetches: 1 to fetch the row blocks that follow these into the cache meanwhile.
        weights: address of the first row block; the next one is `block_bytes` away.
        values: address of the panel's first group.
        result: address of float32 [token][16 num_blocks], rows `result_stride` bytes apart.
    """
    numbers = literal_values((encoding, way, width, first, num_tokens, num_blocks, fetches))
    if numbers is None:
        return None
    tile = PanelTile(
        ENCODINGS[numbers[0]],
        DotProduct(numbers[1]),
        Activations(numbers[2], numbers[3]),
        numbers[4],
        numbers[5],
        bool(numbers[6]),
    )

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        tile.write(builder, arguments[7:])
        return context.get_dummy_value()

    literals = (encoding, way, width, first, num_tokens, num_blocks, fetches)
    return types.void(*literals, *[types.int64] * 6), codegen


@dataclass(frozen=True, slots=True)
class PanelTile:
    """Writes the loop of `panel_block` for fixed numbers of tokens and row blocks."""

    encoding: Encoding
    way: DotProduct
    activations: Activations
    num_tokens: int
    num_blocks: int
    fetches: bool

    def write(self, builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> None:
        """The loop over groups. Float totals stay in registers or go through memory, as LLVM decides."""
        weights, block_bytes, values, num_groups, result, stride = arguments
        writer = Writer(builder, self.way)
        tokens = [builder.add(result, builder.mul(stride, I64(token))) for token in range(self.num_tokens)]
        start = [writer.load(F32X16, token, 64 * block) for token in tokens for block in range(self.num_blocks)]
        loop = Loop(builder, num_groups, [weights, values, *start])
        group, panel, *totals = loop.carried
        blocks = [builder.add(group, builder.mul(block_bytes, I64(block))) for block in range(self.num_blocks)]
        if self.fetches:
            self._fetch(writer, blocks, builder.mul(block_bytes, I64(self.num_blocks)))
        sums = self._integer_sums(writer, blocks, panel)
        following = self._add(writer, blocks, panel, sums, totals)
        loop.close(
            [
                builder.add(group, I64(self.encoding.group_bytes)),
                builder.add(panel, I64(GROUP_BYTES * self.activations.width)),
                *following,
            ]
        )
        for index, total in enumerate(following):
            writer.store(total, tokens[index // self.num_blocks], 64 * (index % self.num_blocks))

    def _fetch(self, writer: Writer, blocks: Sequence[ir.Value], distance: ir.Value) -> None:
        for block in blocks:
            following = writer.builder.add(block, distance)
            for offset in range(0, self.encoding.group_bytes, VECTOR_BYTES):
                writer.prefetch(following, offset)

    def _integer_sums(self, writer: Writer, blocks: Sequence[ir.Value], panel: ir.Value) -> list[list[list[ir.Value]]]:
        """[scale group][token][block]."""
        length = STEPS // self.encoding.scales_per_group
        weights = [writer.group_weights(self.encoding, block) for block in blocks]
        result = []
        for first in range(0, STEPS, length):
            sums = [[constant(I32, 0)] * self.num_blocks for _ in range(self.num_tokens)]
            for step in range(first, first + length):
                for token in range(self.num_tokens):
                    value = writer.load_splat(I32, panel, self.activations.values(step, token))
                    sums[token] = [
                        writer.dot(total, block[step], value) for total, block in zip(sums[token], weights, strict=True)
                    ]
            result.append(sums)
        return result

    def _add(
        self,
        writer: Writer,
        blocks: Sequence[ir.Value],
        panel: ir.Value,
        sums: Sequence[Sequence[Sequence[ir.Value]]],
        totals: Sequence[ir.Value],
    ) -> list[ir.Value]:
        scales = [writer.group_scales(self.encoding, block) for block in blocks]
        count = self.encoding.scales_per_group
        result = []
        for token in range(self.num_tokens):
            scale = writer.load_splat(F32, panel, self.activations.scale(token))
            value_sums = [writer.load_splat(F32, panel, self.activations.sum(token))]
            if count == 2:
                steps = [writer.load_splat(I32, panel, self.activations.values(step, token)) for step in range(STEPS)]
                value_sums = half_sums(writer, steps, scale)
            for block in range(self.num_blocks):
                parts = [sums[index][token][block] for index in range(count)]
                total = totals[token * self.num_blocks + block]
                result.append(add_group(writer, total, parts, *scales[block], (scale, value_sums)))
        return result
