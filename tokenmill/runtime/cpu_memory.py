"""`ProgramMemory`: where a program's buffers, weights and scratch memory lie, as addresses for the kernels' op rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from tokenmill.ops.cpu.layout import GROUP_BYTES, GROUP_SIZE, int8_group32_bytes, panel_width
from tokenmill.program.program import Buffer, Operand, Program
from tokenmill.runtime.huge_pages import Bytes, HugePages
from tokenmill.runtime.program_parts import split_program
from tokenmill.runtime.step_arrays import StepArrays

FLOAT_BYTES: Final = 4

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


class ProgramMemory:
    """Memory of one executor.

    Args:
        program: whose buffers are placed: in the arena as it is planned, or side by side.
        arrays: the step's integers.
        apart: buffers that get memory of their own, which nothing else overwrites.
    """

    def __init__(self, program: Program, arrays: StepArrays, apart: Sequence[str]) -> None:
        self.arrays = arrays
        self.pages = HugePages()
        self.buffers: Mapping[str, Buffer] = {
            buffer.name: buffer for buffer in (*program.inputs, *program.buffers, program.output)
        }
        inputs = {"token_ids": arrays.token_ids, "positions": arrays.positions, "row_index": arrays.row_index}
        self._contents: dict[str, Bytes] = {name: array.view(np.uint8) for name, array in inputs.items()}
        arena = self.pages.take(program.arena_bytes)
        for buffer in (*program.buffers, program.output):
            size = _num_bytes(buffer, arrays.max_num_tokens, arrays.max_num_rows)
            if buffer.offset is None or buffer.name in apart:
                self._contents[buffer.name] = self.pages.take(size)
            else:
                assert buffer.offset + size <= len(arena), f"{buffer.name} does not fit its place in the arena"
                self._contents[buffer.name] = arena[buffer.offset : buffer.offset + size]
        self._addresses = {name: content.ctypes.data for name, content in self._contents.items()}

    def address(self, operand: Operand) -> int:
        """Of the operand's first column, in a buffer of 4-byte values."""
        return self._addresses[operand.buffer] + operand.first_column * FLOAT_BYTES

    def buffer_address(self, name: str) -> int:
        """Of a buffer."""
        return self._addresses[name]

    def stride(self, operand: Operand) -> int:
        """Bytes from row to row, in a buffer of 4-byte values."""
        return self.buffers[operand.buffer].columns * FLOAT_BYTES

    def is_quantized(self, operand: Operand) -> bool:
        """Whether the operand's buffer is `int8_group32`."""
        return self.buffers[operand.buffer].dtype == "int8_group32"

    def put(self, content: Bytes | Floats) -> int:
        """The address of `content` in memory that stays: where it is, or of a copy."""
        flat = np.ascontiguousarray(content).view(np.uint8).reshape(-1)
        if self.pages.holds(flat):
            return flat.ctypes.data
        place = self.pages.take(flat.nbytes)
        place[:] = flat
        return place.ctypes.data

    def reserve(self, num_bytes: int) -> int:
        """Memory that stays; its address."""
        return self.pages.take(num_bytes).ctypes.data

    def values(self, name: str, num_rows: int) -> Floats:
        """A copy of the first rows of any buffer of the program, as floats."""
        buffer = self.buffers[name]
        if buffer.dtype != "int8_group32":
            return self.floats(name, num_rows).copy()
        content = self._contents[name][: int8_group32_bytes(num_rows, buffer.columns)]
        return _decode_int8(content, num_rows, buffer.columns)

    def floats(self, name: str, num_rows: int) -> Floats:
        """The first rows of a float buffer: a view."""
        columns = self.buffers[name].columns
        values: Floats = self._contents[name].view(np.float32)
        return values[: num_rows * columns].reshape(num_rows, columns)


def step_nbytes(program: Program, max_num_tokens: int, max_num_rows: int) -> int:
    """Bytes that `ProgramMemory` takes for the results of the largest step: the arena, the logits, and what the head
    reads, which the executor keeps apart. The kernels' scratch memory, some MB, is not counted.

    Args:
        program: with a memory plan.
        max_num_tokens, max_num_rows: of the largest step.
    """
    apart = (*split_program(program).hidden, program.output)
    return program.arena_bytes + sum(_num_bytes(buffer, max_num_tokens, max_num_rows) for buffer in apart)


def _num_bytes(buffer: Buffer, max_num_tokens: int, max_num_rows: int) -> int:
    """Bytes of a buffer at the largest step."""
    sizes: Mapping[int | str, int] = {"tokens": max_num_tokens, "rows": max_num_rows}
    rows = sizes[buffer.rows] if isinstance(buffer.rows, str) else buffer.rows
    if buffer.dtype == "int8_group32":
        return int8_group32_bytes(rows, buffer.columns)
    return rows * buffer.columns * FLOAT_BYTES


def _decode_int8(content: Bytes, num_tokens: int, num_columns: int) -> Floats:
    """Values of an `int8_group32` buffer: panels of tokens, see `ops.cpu.layout`."""
    width, num_groups = panel_width(num_tokens), -(-num_columns // GROUP_SIZE)
    records = content.reshape(-1, num_groups, GROUP_BYTES * width)  # [panels, groups, bytes]
    levels = records[:, :, : GROUP_SIZE * width].view(np.int8).reshape(-1, num_groups, 8, width, 4)
    scales = records[:, :, GROUP_SIZE * width : (GROUP_SIZE + 4) * width].copy().view(np.float32)
    values = levels.transpose(0, 3, 1, 2, 4).reshape(-1, num_groups, GROUP_SIZE)  # [tokens, groups, columns]
    scaled: Floats = values * scales.transpose(0, 2, 1).reshape(-1, num_groups, 1)
    return scaled.reshape(len(values), -1)[:num_tokens, :num_columns]
