"""The op `quantize` and quantized results of activations: rows as `int8_group32` (see `layout.py`)."""

from __future__ import annotations

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
from tokenmill.ops.cpu.jit import device, float_bits, kernel
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS, GROUP_SIZE
from tokenmill.ops.cpu.panels import TILE_STRIDE, clear_tile, store_panel_group, tile_memory
from tokenmill.ops.cpu.simd import LANES, load, store_first


@device
def group_values(row: int, token: int, column: int, tile: int) -> None:
    """The function's values of 32 columns of a token; nothing is written beyond the last column."""
    columns, function = argument(row, COLUMNS), argument(row, FUNCTION)
    a = argument(row, A) + token * argument(row, A_STRIDE) + 4 * column
    b = argument(row, B) + token * argument(row, B_STRIDE) + 4 * column
    for offset in range(0, min(GROUP_SIZE, columns - column), LANES):
        count = min(LANES, columns - column - offset)
        store_first(tile + 4 * offset, apply(row, function, a + 4 * offset, b + 4 * offset, count), count)


@kernel
def quantize(thread: int, num_threads: int, row: int) -> None:
    """A function of rows (copy for the op `quantize`), quantized. Items: panel and group."""
    num_tokens, num_groups = argument(row, COLUMN_NUM_TOKENS), argument(row, OUTPUT_STRIDE)
    width = device_panel_width(num_tokens)
    tile = tile_memory()
    clear_tile(tile)
    first, end = chunk_range(thread, num_threads, (num_tokens + width - 1) // width * num_groups)
    for item in range(first, end):
        first_token, group = item // num_groups * width, item % num_groups
        column = group * GROUP_SIZE
        if num_tokens - first_token < width or column + GROUP_SIZE > argument(row, COLUMNS):
            clear_tile(tile)
        for token in range(first_token, min(num_tokens, first_token + width)):
            group_values(row, token, column, tile + (token - first_token) * TILE_STRIDE)
        record = group_address(argument(row, OUTPUT), num_groups, width, first_token, group)
        if width == 1:
            store_group(record, width, 0, load(tile), load(tile + TILE_STRIDE // 2))
        else:
            store_panel_group(record, width, tile)


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
