"""What the int8 linear kernels do with finished sums: scale, bias, residual, gated activation, store or quantize."""

from __future__ import annotations

from typing import Final

from tokenmill.ops.cpu.activations import group_address, store_group
from tokenmill.ops.cpu.intrinsics import argument, device_panel_width
from tokenmill.ops.cpu.jit import device
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS, FIRST_ARGUMENT, GROUP_SIZE
from tokenmill.ops.cpu.packing import ROW_BLOCK
from tokenmill.ops.cpu.panels import TILE_STRIDE, clear_tile, store_panel_group, tile_memory
from tokenmill.ops.cpu.simd import add, load, load_first, multiply, store, store_first
from tokenmill.ops.cpu.vector_math import gelu_tanh, silu

# Columns of the op row.
OUTPUT: Final = FIRST_ARGUMENT + 7  # address of y, of its first column for float32
OUTPUT_STRIDE: Final = FIRST_ARGUMENT + 8  # bytes from token to token, for float32
OUTPUT_GROUPS: Final = FIRST_ARGUMENT + 9  # groups of a token in an int8_group32 buffer; 0: y is float32
NUM_COLUMNS: Final = FIRST_ARGUMENT + 10  # columns of y
BIAS: Final = FIRST_ARGUMENT + 11  # address of float32 [rows of the weight], or 0
RESIDUAL: Final = FIRST_ARGUMENT + 12  # address of float32 to add, or 0
RESIDUAL_STRIDE: Final = FIRST_ARGUMENT + 13  # bytes from token to token
ACTIVATION: Final = FIRST_ARGUMENT + 14  # of `ACTIVATIONS`; anything but 0: the weight is gated
CHANNEL_SCALES: Final = FIRST_ARGUMENT + 15  # address of float32 [padded rows] in the order of the row blocks, or 0

NO_ACTIVATION: Final = 0
SILU: Final = 1
GELU_TANH: Final = 2
ACTIVATIONS: Final = {None: NO_ACTIVATION, "silu": SILU, "gelu_pytorch_tanh": GELU_TANH}

BLOCK_TOTALS: Final = 4 * ROW_BLOCK
"""Bytes of the sums of a row block and token."""


@device
def finish_plain(row: int, totals: int, first_token: int, num_tokens: int, first_block: int, num_blocks: int) -> None:
    """Finish and store row blocks of some tokens.

    Args:
        totals: address of the sums, float32 [num_tokens, num_blocks, 16].
    """
    scales, bias, residual = argument(row, CHANNEL_SCALES), argument(row, BIAS), argument(row, RESIDUAL)
    output_stride, residual_stride = argument(row, OUTPUT_STRIDE), argument(row, RESIDUAL_STRIDE)
    output = argument(row, OUTPUT) + first_token * output_stride
    residual_row = residual + first_token * residual_stride
    num_columns = argument(row, NUM_COLUMNS)
    for _ in range(num_tokens):
        for block in range(first_block, first_block + num_blocks):
            count = min(num_columns - block * ROW_BLOCK, ROW_BLOCK)
            value = load(totals)
            totals += BLOCK_TOTALS
            if count <= 0:
                continue
            place = block * BLOCK_TOTALS
            if scales != 0:
                value = multiply(value, load(scales + place))
            if bias != 0:
                value = add(value, load_first(bias + place, count))
            if residual != 0:
                value = add(value, load_first(residual_row + place, count))
            store_first(output + place, value, count)
        output += output_stride
        residual_row += residual_stride


@device
def gated_value(row: int, totals: int, block: int, pair: int):  # type: ignore[no-untyped-def]
    """activation(gate) * up for 16 columns; `block` counts pairs of row blocks, `pair` those in the chunk."""
    gate, up = load(totals + 2 * pair * BLOCK_TOTALS), load(totals + (2 * pair + 1) * BLOCK_TOTALS)
    scales, bias = argument(row, CHANNEL_SCALES), argument(row, BIAS)
    if scales != 0:
        gate = multiply(gate, load(scales + 2 * block * BLOCK_TOTALS))
        up = multiply(up, load(scales + (2 * block + 1) * BLOCK_TOTALS))
    if bias != 0:
        num_columns = argument(row, NUM_COLUMNS)
        count = min(num_columns - block * ROW_BLOCK, ROW_BLOCK)
        gate = add(gate, load_first(bias + block * BLOCK_TOTALS, count))
        up = add(up, load_first(bias + 4 * num_columns + block * BLOCK_TOTALS, count))
    if argument(row, ACTIVATION) == SILU:
        return multiply(silu(gate), up)
    return multiply(gelu_tanh(gate), up)


@device
def finish_gated(row: int, totals: int, first_token: int, num_tokens: int, chunk: int) -> None:
    """Finish and store 32 columns of some tokens, from sums [num_tokens, 4, 16] of gate, up, gate, up.

    Panels that lie among these tokens are quantized as a whole, of others a token at a time; the result is the same.
    """
    num_columns, num_groups = argument(row, NUM_COLUMNS), argument(row, OUTPUT_GROUPS)
    output, output_stride = argument(row, OUTPUT), argument(row, OUTPUT_STRIDE)
    last = argument(row, COLUMN_NUM_TOKENS)
    width = device_panel_width(last)
    tile = tile_memory()
    if num_groups != 0 and width > 1:
        clear_tile(tile)
    end = first_token + num_tokens
    for token in range(first_token, end):
        low = gated_value(row, totals, 2 * chunk, 0)
        high = gated_value(row, totals, 2 * chunk + 1, 1)
        totals += 4 * BLOCK_TOTALS
        if num_groups == 0:
            place = output + token * output_stride + chunk * GROUP_SIZE * 4
            rest = num_columns - chunk * GROUP_SIZE
            store_first(place, low, min(rest, ROW_BLOCK))
            if rest > ROW_BLOCK:
                store_first(place + BLOCK_TOTALS, high, min(rest - ROW_BLOCK, ROW_BLOCK))
            continue
        record = group_address(output, num_groups, width, token, chunk)
        lane = token % width
        panel_end = min(token - lane + width, last)
        if width == 1 or token - lane < first_token or panel_end > end:
            store_group(record, width, lane, low, high)
            continue
        store(tile + lane * TILE_STRIDE, low)
        store(tile + lane * TILE_STRIDE + TILE_STRIDE // 2, high)
        if token == panel_end - 1:
            store_panel_group(record, width, tile)
