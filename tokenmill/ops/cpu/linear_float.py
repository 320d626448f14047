"""The op `linear` with float32 or bfloat16 weights and float32 activations; sums in float32, each in order of columns.

A packed weight is row blocks of 16 rows, one after the other: float32 [blocks, columns, 16], or pairs of bfloat16
[blocks, columns / 2, 16, 2]. Rows are padded to a multiple of 32 with zeros; in a gated weight row blocks of gate and
up alternate, as in `packing.py`. A token's result is bitwise the same with any other tokens beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from tokenmill.errors import InvalidParameterError, UnsupportedFeatureError
from tokenmill.ops.cpu.intrinsics import argument, chunk_range
from tokenmill.ops.cpu.jit import kernel
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS, FIRST_ARGUMENT, GROUP_SIZE
from tokenmill.ops.cpu.linear_epilogue import ACTIVATION, ACTIVATIONS, NO_ACTIVATION, finish_gated, finish_plain
from tokenmill.ops.cpu.packing import ROW_BLOCK, padded_rows
from tokenmill.ops.cpu.simd import I64, int64, none, operation, store_vector
from tokenmill.ops.cpu.tiles import (
    ElementKind,
    Matrix,
    emit_cases,
    has_wide_registers,
    offsets,
    tile_loop,
    zeros,
)

# Columns of the op row; those of `linear_epilogue.py` follow.
X: Final = FIRST_ARGUMENT
X_STRIDE: Final = FIRST_ARGUMENT + 1
WEIGHT: Final = FIRST_ARGUMENT + 2
NUM_ELEMENTS: Final = FIRST_ARGUMENT + 3  # columns of the weight, or pairs of them
NUM_BLOCKS: Final = FIRST_ARGUMENT + 4
IS_BFLOAT16: Final = FIRST_ARGUMENT + 5
SCRATCH: Final = FIRST_ARGUMENT + 6

KINDS: Final[tuple[ElementKind, ...]] = ("float32", "mixed_pair")
"""By the number in IS_BFLOAT16."""

TOKENS_PER_TILE: Final = 8 if has_wide_registers() else 4
BLOCKS_PER_TILE: Final = 2 if has_wide_registers() else 1
TILE_TOKENS: Final = tuple(count for count in (1, 2, 4, 8) if count <= TOKENS_PER_TILE)

TOKENS_PER_ITEM: Final = 128
"""Tokens that a thread computes with a chunk of rows before it goes on."""

BLOCK_BYTES: Final = 4 * ROW_BLOCK
MAX_BLOCKS: Final = 4
SCRATCH_BYTES: Final = TOKENS_PER_TILE * MAX_BLOCKS * BLOCK_BYTES
"""Scratch memory of one thread; ops may share it."""

_MAX_CASES: Final = 16


@operation(none, int64, int64, int64, int64, int64, int64, int64, int64, int64)
def multiply_tile(
    builder: ir.IRBuilder,
    is_bfloat16: ir.Value,
    tokens: ir.Value,
    x: ir.Value,
    x_stride: ir.Value,
    weight: ir.Value,
    block_stride: ir.Value,
    count: ir.Value,
    totals: ir.Value,
    totals_stride: ir.Value,
) -> None:
    """totals[tokens][2 row blocks] = x weight^T over `count` elements, for a number of tokens out of `TILE_TOKENS`."""

    def emit(kind: ElementKind, num_tokens: int) -> None:
        places = offsets(builder, weight, block_stride, 2)
        a = Matrix(offsets(builder, x, x_stride, num_tokens), I64(8 if kind == "mixed_pair" else 4))
        for first in range(0, 2, BLOCKS_PER_TILE):
            b = Matrix(places[first : first + BLOCKS_PER_TILE], I64(BLOCK_BYTES))
            sums = tile_loop(builder, kind, a, b, count, zeros(num_tokens, BLOCKS_PER_TILE))
            start = builder.add(totals, I64(first * BLOCK_BYTES))
            for address, row in zip(offsets(builder, start, totals_stride, num_tokens), sums, strict=True):
                for place, total in zip(offsets(builder, address, BLOCK_BYTES, len(row)), row, strict=True):
                    store_vector(builder, place, total)

    cases = {
        index * _MAX_CASES + num_tokens: partial(emit, kind, num_tokens)
        for index, kind in enumerate(KINDS)
        for num_tokens in TILE_TOKENS
    }
    emit_cases(builder, builder.add(builder.mul(is_bfloat16, I64(_MAX_CASES)), tokens), cases)


@kernel
def linear_float(thread: int, num_threads: int, row: int) -> None:
    """Items: up to 128 tokens and 2 row blocks, or 2 of gate and 2 of up."""
    num_tokens, num_elements = argument(row, COLUMN_NUM_TOKENS), argument(row, NUM_ELEMENTS)
    x, x_stride = argument(row, X), argument(row, X_STRIDE)
    totals = argument(row, SCRATCH) + thread * SCRATCH_BYTES
    is_gated = argument(row, ACTIVATION) != NO_ACTIVATION
    chunk_blocks = 4 if is_gated else 2
    stride = chunk_blocks * BLOCK_BYTES
    block_stride = num_elements * BLOCK_BYTES
    num_chunks = argument(row, NUM_BLOCKS) // chunk_blocks
    num_parts = (num_tokens + TOKENS_PER_ITEM - 1) // TOKENS_PER_ITEM
    first, end = chunk_range(thread, num_threads, num_chunks * num_parts)
    for item in range(first, end):
        token, chunk = item // num_chunks * TOKENS_PER_ITEM, item % num_chunks
        last = min(num_tokens, token + TOKENS_PER_ITEM)
        weight = argument(row, WEIGHT) + chunk * chunk_blocks * block_stride
        while token < last:
            count = TOKENS_PER_TILE
            while count > last - token:
                count //= 2
            for pair in range(0, chunk_blocks, 2):
                multiply_tile(
                    argument(row, IS_BFLOAT16),
                    count,
                    x + token * x_stride,
                    x_stride,
                    weight + pair * block_stride,
                    block_stride,
                    num_elements,
                    totals + pair * BLOCK_BYTES,
                    stride,
                )
            if is_gated:
                finish_gated(row, totals, token, count, chunk)
            else:
                finish_plain(row, totals, token, count, 2 * chunk, 2)
            token += count


def pack_float_weight(
    parts: Sequence[npt.NDArray[np.float32] | npt.NDArray[np.uint16]], *, gated: bool = False
) -> npt.NDArray[np.uint8]:
    """Pack tensors as one weight with their rows one after the other.

    Args:
        parts: [rows, columns] each; float32, or the bits of bfloat16 as uint16.
        gated: `parts` are gate and up, of the same shape.

    Returns:
        The bytes, contiguous; may be stored and read back.

    Raises:
        InvalidParameterError: shapes or types do not go together.
        UnsupportedFeatureError: bfloat16 with an odd number of columns.
    """
    shapes, kinds = {part.shape[1] for part in parts}, {part.dtype.name for part in parts}
    if len(shapes) != 1 or len(kinds) != 1 or not kinds <= {"float32", "uint16"}:
        raise InvalidParameterError(f"Parts have {sorted(shapes)} columns of {sorted(kinds)}.", field="parts")
    if gated and (len(parts) != 2 or parts[0].shape != parts[1].shape):
        raise InvalidParameterError("A gated weight has gate and up, of the same shape.", field="parts")
    num_columns = shapes.pop()
    per_element = 2 if parts[0].dtype == np.uint16 else 1
    if num_columns % per_element:
        raise UnsupportedFeatureError(
            f"A bfloat16 weight of {num_columns} columns cannot be packed: the number must be even.",
            field="format",
            remedy="Use float32.",
        )
    groups = [parts[:1], parts[1:]] if gated else [parts]
    blocks = [_row_blocks(np.concatenate(list(group)), per_element) for group in groups]
    packed = np.stack(blocks, axis=1)  # [blocks, gate and up, elements, 16, values of an element]
    return np.ascontiguousarray(packed).view(np.uint8).reshape(-1)


def _row_blocks(rows: npt.NDArray[np.generic], per_element: int) -> npt.NDArray[np.generic]:
    """[blocks, elements, 16, values of an element]; the number of rows is padded."""
    num_rows, num_columns = rows.shape
    padded = np.zeros((padded_rows(num_rows), num_columns), rows.dtype)
    padded[:num_rows] = rows
    return padded.reshape(-1, ROW_BLOCK, num_columns // per_element, per_element).transpose(0, 2, 1, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFloatOp:
    """What the row of a `linear_float` op says.

    Args:
        x: address, and bytes from row to row, of float32 [T, num_columns].
        weight: address of a packed weight.
        is_bfloat16: its type; else float32.
        num_rows, num_columns: of the weight; gate and up together.
        output: address, and bytes from row to row; may be the residual's, not x's.
        scratch: `num_threads * SCRATCH_BYTES` bytes.
        bias: address of float32 [num_rows], or 0.
        residual: like output.
        activation: silu or gelu_pytorch_tanh: the weight is gated, and there is no residual.
        quantized: the output is an `int8_group32` buffer; with an activation only.
    """

    x: tuple[int, int]
    weight: int
    is_bfloat16: bool
    num_rows: int
    num_columns: int
    output: tuple[int, int]
    scratch: int
    bias: int = 0
    residual: tuple[int, int] | None = None
    activation: str | None = None
    quantized: bool = False

    def arguments(self) -> tuple[int, ...]:
        """The row from `FIRST_ARGUMENT` on.

        Raises:
            InvalidParameterError: parts that do not go together.
        """
        is_gated = self.activation is not None
        if self.activation not in ACTIVATIONS:
            raise InvalidParameterError(f"No activation {self.activation!r}.", field="activation")
        if (self.quantized and not is_gated) or (self.residual is not None and is_gated):
            raise InvalidParameterError(
                "A gated linear op has no residual, and only a gated one a quantized output.", field="activation"
            )
        columns = self.num_rows // 2 if is_gated else self.num_rows
        return (
            *self.x,
            self.weight,
            self.num_columns // 2 if self.is_bfloat16 else self.num_columns,
            padded_rows(self.num_rows, gated=is_gated) // ROW_BLOCK,
            int(self.is_bfloat16),
            self.scratch,
            *self.output,
            -(-columns // GROUP_SIZE) if self.quantized else 0,
            columns,
            self.bias,
            *(self.residual or (0, 0)),
            ACTIVATIONS[self.activation],
            0,
        )
