"""Bytes of a program's buffers: what the memory plan places, and what a loaded engine is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tokenmill.program.program import Buffer

ALIGNMENT: Final = 64
"""Bytes; a cache line."""

ROW_MULTIPLE: Final = 16
"""Rows of `int8_group32` buffers are counted up to a multiple of it: packed layouts work on so many at a time."""


def buffer_nbytes(buffer: Buffer, max_tokens: int, max_rows: int) -> int:
    """Bytes of a buffer at the largest step, aligned."""
    sizes: Mapping[str | int, int] = {"tokens": max_tokens, "rows": max_rows}
    num_rows = sizes[buffer.rows] if isinstance(buffer.rows, str) else buffer.rows
    if buffer.dtype == "int8_group32":
        num_groups = -(-buffer.columns // 32)
        row_nbytes = num_groups * (32 + 8)
        num_rows = _round_up(num_rows, ROW_MULTIPLE)
    else:
        row_nbytes = buffer.columns * (2 if buffer.dtype == "bfloat16" else 4)
    return _round_up(num_rows * row_nbytes, ALIGNMENT)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
