"""Inner loops of the int8 linear kernels, written as LLVM code so that all accumulators stay in registers.

`gemv_block` streams packed weights past one token, `panel_block` multiplies them with tokens of a panel. Both add up a
group of 32 columns in integers and then the groups in float32, in the same order and with the same operations: a
token's result does not depend on which of them computed it. The layout of packed weights is described in `packing.py`,
that of activations in `layout.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from llvmlite import ir

from tokenmill.ops.cpu.cpu_features import DotProduct
from tokenmill.ops.cpu.dot_product import DotSum, Loop, Writer
from tokenmill.ops.cpu.layout import GROUP_BYTES, GROUP_SIZE
from tokenmill.ops.cpu.native_types import int64, literal, none
from tokenmill.ops.cpu.packing import ENCODINGS, ROW_BLOCK, Encoding
from tokenmill.ops.cpu.simd import F32, F32X16, I32, I32X16, I64, constant, extend_half, operation

F16X16: Final = ir.VectorType(ir.HalfType(), 16)
VECTOR_BYTES: Final = 64
STEPS: Final = GROUP_SIZE // 4
"""Dot products of 4 columns in a group."""


class GroupReader:
    """Writes the reading of packed groups.

    Args:
        writer: of the code.
        encoding: of the weights.
    """

    def __init__(self, writer: Writer, encoding: Encoding) -> None:
        self._writer = writer
        self._encoding = encoding

    def weights(self, group: ir.Value) -> list[ir.Value]:
        """The 8 vectors of unsigned weights of the group at an address."""
        first, bits = self._encoding.values_offset, self._encoding.bits
        count = STEPS if bits == 8 else STEPS // 2 + bits - 4
        vectors = [self._writer.load(I32X16, group, first + VECTOR_BYTES * index) for index in range(count)]
        if bits == 8:
            return vectors
        low = [self._bits(vector, shift, 0x0F) for shift in (0, 4) for vector in vectors[: STEPS // 2]]
        if bits == 4:
            return low
        width = bits - 4  # high bits of a weight; a byte has those of 8 / width steps
        return [
            self._writer.builder.or_(
                nibble, self._bits(vectors[4 + step * width // 8], step * width % 8 - 4, ((1 << width) - 1) << 4)
            )
            for step, nibble in enumerate(low)
        ]

    def _bits(self, vector: ir.Value, shift: int, mask: int) -> ir.Value:
        """Bits of each byte, shifted right (left if negative)."""
        builder = self._writer.builder
        if shift:
            vector = (builder.lshr if shift > 0 else builder.shl)(vector, constant(I32, abs(shift)))
        return builder.and_(vector, constant(I32, mask * 0x01010101))

    def scales(self, group: ir.Value) -> tuple[list[ir.Value], list[ir.Value]]:
        """Scales and minimums of the 16 rows of the group, for each scale group."""
        encoding = self._encoding
        count, size = encoding.scales_per_group, encoding.scale_bytes * ROW_BLOCK
        shift = constant(F32, -float(encoding.zero_point))
        if size == 0:
            return [constant(F32, 1.0)], [shift]
        scales = [self._floats(group, size * index) for index in range(count)]
        if encoding.has_minimum:
            return scales, [self._floats(group, size * (count + index)) for index in range(count)]
        return scales, [self._writer.builder.fmul(scale, shift) for scale in scales]

    def _floats(self, group: ir.Value, offset: int) -> ir.Value:
        if self._encoding.scale_bytes == 4:
            return self._writer.load(F32X16, group, offset)
        return extend_half(self._writer.builder, self._writer.load(F16X16, group, offset))


@dataclass(frozen=True, slots=True)
class PanelOffsets:
    """Where a group of a panel's tokens has what, from its first byte.

    Args:
        width: tokens of the panel.
    """

    width: int

    def values(self, step: int, token: int) -> int:
        """4 columns of a token."""
        return (step * self.width + token) * 4

    def scale(self, token: int) -> int:
        """A token's scale."""
        return GROUP_SIZE * self.width + 4 * token

    def sum(self, token: int) -> int:
        """A token's product of scale and sum."""
        return self.scale(token) + 4 * self.width


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


def dot_steps(
    writer: Writer, encoding: Encoding, weights: Sequence[ir.Value], values: Sequence[ir.Value]
) -> list[ir.Value]:
    """Integer sums of a group for each of its scale groups."""
    sums = [DotSum(writer, encoding.bits) for _ in range(encoding.scales_per_group)]
    for step in range(STEPS):
        sums[step * len(sums) // STEPS].add(weights[step], values[step])
    return [total.result() for total in sums]


def half_sums(writer: Writer, values: Sequence[ir.Value], scale: ir.Value) -> list[ir.Value]:
    """Products of scale and sum for both halves of a group, which activations do not have."""
    sums = [DotSum(writer, 1), DotSum(writer, 1)]
    for step, value in enumerate(values):
        sums[step * 2 // STEPS].add(constant(I32, 0x01010101), value)
    return [writer.builder.fmul(writer.builder.sitofp(part.result(), F32X16), scale) for part in sums]


@operation(none, literal, literal, int64, int64, int64, int64)
def gemv_block(
    builder: ir.IRBuilder,
    encoding: int,
    way: int,
    weights: ir.Value,
    values: ir.Value,
    num_groups: ir.Value,
    result: ir.Value,
) -> None:
    """Products of the 16 rows of a packed row block at `weights` and one token at `values`; 16 float32 to `result`."""
    layout, offsets = ENCODINGS[encoding], PanelOffsets(1)
    writer = Writer(builder, DotProduct(way))
    reader = GroupReader(writer, layout)
    loop = Loop(builder, num_groups, [weights, values, constant(F32, 0.0)])
    group, token, total = loop.carried
    steps = [writer.load_splat(I32, token, offsets.values(step, 0)) for step in range(STEPS)]
    sums = dot_steps(writer, layout, reader.weights(group), steps)
    scale = writer.load_splat(F32, token, offsets.scale(0))
    value_sums = [writer.load_splat(F32, token, offsets.sum(0))]
    if layout.scales_per_group == 2:
        value_sums = half_sums(writer, steps, scale)
    following = add_group(writer, total, sums, *reader.scales(group), (scale, value_sums))
    loop.close([builder.add(group, I64(layout.group_bytes)), builder.add(token, I64(GROUP_BYTES)), following])
    writer.store(following, result)


@operation(none, *[literal] * 5, *[int64] * 7)
def panel_block(
    builder: ir.IRBuilder,
    encoding: int,
    way: int,
    width: int,
    num_tokens: int,
    num_blocks: int,
    weights: ir.Value,
    block_bytes: ir.Value,
    ahead: ir.Value,
    values: ir.Value,
    num_groups: ir.Value,
    result: ir.Value,
    result_stride: ir.Value,
) -> None:
    """Add to `result` the products of row blocks and tokens of a panel.

    Args:
        encoding, way, width, num_tokens, num_blocks: known when the kernel is compiled.
        weights: address of the first row block; the next one is `block_bytes` away.
        ahead: bytes from these row blocks to those that are needed next, which are fetched into the cache meanwhile.
        values: address of the panel's first group, plus 4 for each token that is not wanted at its start.
        result: address of float32 [token][16 num_blocks], rows `result_stride` bytes apart.
    """
    tile = PanelTile(ENCODINGS[encoding], DotProduct(way), PanelOffsets(width), num_tokens, num_blocks)
    tile.write(builder, [weights, block_bytes, ahead, values, num_groups, result, result_stride])


@dataclass(frozen=True, slots=True)
class PanelTile:
    """Writes the loop of `panel_block` for fixed numbers of tokens and row blocks."""

    encoding: Encoding
    way: DotProduct
    offsets: PanelOffsets
    num_tokens: int
    num_blocks: int

    def write(self, builder: ir.IRBuilder, arguments: Sequence[ir.Value]) -> None:
        """The loop over groups. Float totals stay in registers or go through memory, as LLVM decides."""
        weights, block_bytes, ahead, values, num_groups, result, stride = arguments
        writer = Writer(builder, self.way)
        tokens = [builder.add(result, builder.mul(stride, I64(token))) for token in range(self.num_tokens)]
        start = [writer.load(F32X16, token, 64 * block) for token in tokens for block in range(self.num_blocks)]
        loop = Loop(builder, num_groups, [weights, values, *start])
        group, panel, *totals = loop.carried
        blocks = [builder.add(group, builder.mul(block_bytes, I64(block))) for block in range(self.num_blocks)]
        for block in blocks:
            for offset in range(0, self.encoding.group_bytes, VECTOR_BYTES):
                writer.prefetch(builder.add(block, ahead), offset)
        following = self._add(writer, blocks, panel, self._integer_sums(writer, blocks, panel), totals)
        loop.close(
            [
                builder.add(group, I64(self.encoding.group_bytes)),
                builder.add(panel, I64(GROUP_BYTES * self.offsets.width)),
                *following,
            ]
        )
        for index, total in enumerate(following):
            writer.store(total, tokens[index // self.num_blocks], 64 * (index % self.num_blocks))

    def _integer_sums(self, writer: Writer, blocks: Sequence[ir.Value], panel: ir.Value) -> list[list[list[ir.Value]]]:
        """[token][block][scale group]. Written step by step, so that a step's weights serve all tokens."""
        count = self.encoding.scales_per_group
        weights = [GroupReader(writer, self.encoding).weights(block) for block in blocks]
        sums = [
            [[DotSum(writer, self.encoding.bits) for _ in range(count)] for _ in blocks] for _ in range(self.num_tokens)
        ]
        for step in range(STEPS):
            for token in range(self.num_tokens):
                value = writer.load_splat(I32, panel, self.offsets.values(step, token))
                for block, parts in zip(weights, sums[token], strict=True):
                    parts[step * count // STEPS].add(block[step], value)
        return [[[part.result() for part in parts] for parts in row] for row in sums]

    def _add(
        self,
        writer: Writer,
        blocks: Sequence[ir.Value],
        panel: ir.Value,
        sums: Sequence[Sequence[Sequence[ir.Value]]],
        totals: Sequence[ir.Value],
    ) -> list[ir.Value]:
        scales = [GroupReader(writer, self.encoding).scales(block) for block in blocks]
        result = []
        for token in range(self.num_tokens):
            scale = writer.load_splat(F32, panel, self.offsets.scale(token))
            value_sums = [writer.load_splat(F32, panel, self.offsets.sum(token))]
            if self.encoding.scales_per_group == 2:
                steps = [writer.load_splat(I32, panel, self.offsets.values(step, token)) for step in range(STEPS)]
                value_sums = half_sums(writer, steps, scale)
            for block, parts in enumerate(sums[token]):
                total = totals[token * self.num_blocks + block]
                result.append(add_group(writer, total, parts, *scales[block], (scale, value_sums)))
        return result
