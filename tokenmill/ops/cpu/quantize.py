"""The op `quantize` and quantized results of activations: rows as `int8_group32` (see `layout.py`)."""

from __future__ import annotations

from typing import Final

from tokenmill.ops.cpu.activations import group_address, store_group
from tokenmill.ops.cpu.elementwise import (
    A_STRIDE,
    B_STRIDE,
    COLUMNS,
    FUNCTION,
    OUTPUT,
    OUTPUT_STRIDE,
    A,
    B,
    apply,
    function_number,
)
from tokenmill.ops.cpu.intrinsics import argument, chunk_range, device_panel_width
from tokenmill.ops.cpu.jit import float_bits, kernel
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS, GROUP_SIZE
from tokenmill.ops.cpu.simd import LANES, keep_lanes

CHUNK_GROUPS: Final = 8
"""Groups of a token that one thread computes at a time."""


@kernel
def quantize(thread: int, num_threads: int, row: int) -> None:
    """A function of rows (copy for the op `quantize`), quantized; columns beyond the last one are zero."""
    columns, function = argument(row, COLUMNS), argument(row, FUNCTION)
    num_tokens = argument(row, COLUMN_NUM_TOKENS)
    width = device_panel_width(num_tokens)
    num_groups = (columns + GROUP_SIZE - 1) // GROUP_SIZE
    chunks_per_token = (num_groups + CHUNK_GROUPS - 1) // CHUNK_GROUPS
    first, end = chunk_range(thread, num_threads, num_tokens * chunks_per_token)
    for chunk in range(first, end):
        token, begin = chunk // chunks_per_token, chunk % chunks_per_token * CHUNK_GROUPS
        a = argument(row, A) + token * argument(row, A_STRIDE)
        b = argument(row, B) + token * argument(row, B_STRIDE)
        for group in range(begin, min(num_groups, begin + CHUNK_GROUPS)):
            column = group * GROUP_SIZE
            low_count = min(LANES, columns - column)
            high_count = max(0, min(LANES, columns - column - LANES))
            offset = 4 * column
            low = apply(row, function, a + offset, b + offset, low_count)
            high = apply(row, function, a + offset + 4 * LANES, b + offset + 4 * LANES, high_count)
            low, high = keep_lanes(low, 0, low_count, 0.0), keep_lanes(high, 0, high_count, 0.0)
            record = group_address(argument(row, OUTPUT), argument(row, OUTPUT_STRIDE), width, token, group)
            store_group(record, width, token % width, low, high)


def quantize_arguments(
    *, a: tuple[int, int], output: int, columns: int, function: str = "copy", b: tuple[int, int] | None = None
) -> tuple[int, ...]:
    """Columns of a `quantize` op.

    Args:
        a, b: address, and bytes from row to row, of float32.
        output: address of an `int8_group32` buffer of `columns` columns.
        columns: of the rows.
        function: of `elementwise.FUNCTIONS` but scale and soft_cap.

    Raises:
        InvalidParameterError: no such function, or the wrong number of operands.
    """
    number = function_number(function, has_b=b is not None)
    return (*a, *(b or a), output, -(-columns // GROUP_SIZE), columns, number, float_bits(0.0), 0)
