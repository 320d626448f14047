"""`ProgramMemory`: where a program's buffers, weights and scratch memory lie, as addresses for the kernels' op rows."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from tokenmill.ops.cpu.layout import int8_group32_bytes
from tokenmill.program.program import Buffer, Operand, Program
from tokenmill.runtime.huge_pages import Bytes, HugePages
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
        self._pages = HugePages()
        self.buffers: Mapping[str, Buffer] = {
            buffer.name: buffer for buffer in (*program.inputs, *program.buffers, program.output)
        }
        inputs = {"token_ids": arrays.token_ids, "positions": arrays.positions, "row_index": arrays.row_index}
        self._addresses = {name: array.ctypes.data for name, array in inputs.items()}
        own = [buffer for buffer in program.buffers if buffer.name in apart or program.arena_bytes == 0]
        own.append(program.output)
        arena = self._pages.take(program.arena_bytes)
        for buffer in program.buffers:
            if buffer.offset is not None:
                self._addresses[buffer.name] = arena.ctypes.data + buffer.offset
        for buffer in own:
            self._addresses[buffer.name] = self.reserve(self.num_bytes(buffer))

    def num_bytes(self, buffer: Buffer) -> int:
        """Bytes of a buffer at the largest step."""
        sizes: Mapping[int | str, int] = {"tokens": self.arrays.max_num_tokens, "rows": self.arrays.max_num_rows}
        rows = sizes[buffer.rows] if isinstance(buffer.rows, str) else buffer.rows
        if buffer.dtype == "int8_group32":
            return int8_group32_bytes(rows, buffer.columns)
        return rows * buffer.columns * FLOAT_BYTES

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
        """A copy of `content` in memory that stays; its address."""
        flat = np.ascontiguousarray(content).view(np.uint8).reshape(-1)
        place = self._pages.take(flat.nbytes)
        place[:] = flat
        return place.ctypes.data

    def reserve(self, num_bytes: int) -> int:
        """Memory that stays; its address."""
        return self._pages.take(num_bytes).ctypes.data

    def floats(self, name: str, num_rows: int) -> Floats:
        """The first rows of a float buffer: a view."""
        columns = self.buffers[name].columns
        address, size = self._addresses[name], num_rows * columns
        content = (ctypes.c_float * size).from_address(address)
        return np.frombuffer(content, np.float32).reshape(num_rows, columns)
