"""The ops `rms_norm` and `add_rms_norm` (https://arxiv.org/abs/1910.07467), with float32 or `int8_group32` results."""

from __future__ import annotations

import math
from typing import Final

from tokenmill.errors import InvalidParameterError
from tokenmill.ops.cpu.activations import group_address, store_group
from tokenmill.ops.cpu.intrinsics import argument, chunk_range, device_panel_width, float_argument
from tokenmill.ops.cpu.jit import device, float_bits, kernel
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS, FIRST_ARGUMENT, GROUP_SIZE
from tokenmill.ops.cpu.panels import TILE_STRIDE, clear_tile, store_panel_group, tile_memory
from tokenmill.ops.cpu.simd import (
    LANES,
    add,
    broadcast,
    float32,
    fma,
    load,
    load_f32,
    load_first,
    multiply,
    reduce_add,
    store_f32,
    store_first,
)

X: Final = FIRST_ARGUMENT
X_STRIDE: Final = FIRST_ARGUMENT + 1
RESIDUAL: Final = FIRST_ARGUMENT + 2  # address of what is added first, or 0
RESIDUAL_STRIDE: Final = FIRST_ARGUMENT + 3
SUM: Final = FIRST_ARGUMENT + 4  # address of the sum, if there is a residual
SUM_STRIDE: Final = FIRST_ARGUMENT + 5
OUTPUT: Final = FIRST_ARGUMENT + 6
OUTPUT_STRIDE: Final = FIRST_ARGUMENT + 7
OUTPUT_GROUPS: Final = FIRST_ARGUMENT + 8  # groups of a token in an int8_group32 buffer; 0: y is float32
WEIGHT: Final = FIRST_ARGUMENT + 9
COLUMNS: Final = FIRST_ARGUMENT + 10
SPAN: Final = FIRST_ARGUMENT + 11  # columns of one norm
EPSILON: Final = FIRST_ARGUMENT + 12

UNROLL: Final = 4
ZERO: Final = float32(0.0)


@device
def sum_of_squares(source: int, columns: int) -> float:
    """Of float32 at an address; the order depends on `columns` only."""
    total0, total1, total2, total3 = broadcast(ZERO), broadcast(ZERO), broadcast(ZERO), broadcast(ZERO)
    whole = columns // (UNROLL * LANES) * (UNROLL * LANES)
    for place in range(source, source + 4 * whole, 4 * UNROLL * LANES):
        x0, x1 = load(place), load(place + 64)
        x2, x3 = load(place + 128), load(place + 192)
        total0, total1 = fma(x0, x0, total0), fma(x1, x1, total1)
        total2, total3 = fma(x2, x2, total2), fma(x3, x3, total3)
    for column in range(whole, columns, LANES):
        x0 = load_first(source + 4 * column, min(LANES, columns - column))
        total0 = fma(x0, x0, total0)
    return reduce_add(add(add(total0, total1), add(total2, total3)))


@device
def norm_factor(source: int, columns: int, epsilon: float) -> float:
    """1 / sqrt(mean of squares + epsilon)."""
    return 1.0 / math.sqrt(sum_of_squares(source, columns) / columns + epsilon)


@device
def add_residual(row: int, token: int) -> int:
    """Write the sum of a token, if there is a residual; the address of what is normalized."""
    x = argument(row, X) + token * argument(row, X_STRIDE)
    if argument(row, RESIDUAL) == 0:
        return x
    residual = argument(row, RESIDUAL) + token * argument(row, RESIDUAL_STRIDE)
    target = argument(row, SUM) + token * argument(row, SUM_STRIDE)
    columns = argument(row, COLUMNS)
    for column in range(0, columns, LANES):
        count = min(LANES, columns - column)
        total = add(load_first(x + 4 * column, count), load_first(residual + 4 * column, count))
        store_first(target + 4 * column, total, count)
    return target


@device
def normalized_row(row: int, token: int) -> int:
    """Address of what is normalized, after `add_residual`."""
    if argument(row, RESIDUAL) == 0:
        return argument(row, X) + token * argument(row, X_STRIDE)
    return argument(row, SUM) + token * argument(row, SUM_STRIDE)


@device
def write_normalized(row: int, source: int, factor: float, column: int, count: int, target: int) -> None:
    """Up to `count` columns of a row, times the factor and the weight."""
    weight = argument(row, WEIGHT)
    for begin in range(column, column + count, LANES):
        number = min(LANES, column + count - begin)
        values = multiply(load_first(source + 4 * begin, number), broadcast(factor))
        values = multiply(values, load_first(weight + 4 * begin, number))
        store_first(target + 4 * (begin - column), values, number)


@device
def norm_token(row: int, token: int) -> None:
    """The norm of a token, or of its heads, as float32."""
    columns, span = argument(row, COLUMNS), argument(row, SPAN)
    source = add_residual(row, token)
    output = argument(row, OUTPUT) + token * argument(row, OUTPUT_STRIDE)
    for begin in range(0, 4 * columns, 4 * span):
        factor = norm_factor(source + begin, span, float_argument(row, EPSILON))
        write_normalized(row, source + begin, factor, 0, span, output + begin)


@device
def norm_group(row: int, token: int, group: int, factor: float) -> None:
    """A group of a token that is a panel, normalized and quantized."""
    columns, num_groups = argument(row, COLUMNS), argument(row, OUTPUT_GROUPS)
    place, rest = 4 * GROUP_SIZE * group, columns - GROUP_SIZE * group
    source, weight = normalized_row(row, token) + place, argument(row, WEIGHT) + place
    low_count, high_count = min(LANES, rest), max(0, min(LANES, rest - LANES))
    low = multiply(load_first(source, low_count), broadcast(factor))
    low = multiply(low, load_first(weight, low_count))
    high = multiply(load_first(source + 4 * LANES, high_count), broadcast(factor))
    high = multiply(high, load_first(weight + 4 * LANES, high_count))
    store_group(group_address(argument(row, OUTPUT), num_groups, 1, token, group), 1, 0, low, high)


@device
def norm_panel_group(row: int, panel: int, group: int, width: int, tile: int, factors: int) -> None:
    """A group of a panel's tokens, normalized and quantized."""
    columns, num_groups = argument(row, COLUMNS), argument(row, OUTPUT_GROUPS)
    column, first_token = group * GROUP_SIZE, panel * width
    count = min(width, argument(row, COLUMN_NUM_TOKENS) - first_token)
    if count < width or column + GROUP_SIZE > columns:
        clear_tile(tile)
    for token in range(count):
        source = normalized_row(row, first_token + token)
        number = min(GROUP_SIZE, columns - column)
        write_normalized(row, source, load_f32(factors + 4 * token), column, number, tile + token * TILE_STRIDE)
    store_panel_group(group_address(argument(row, OUTPUT), num_groups, width, first_token, group), width, tile)


@device
def norm_quantized(row: int, width: int, first: int, end: int, tile: int, factors: int) -> None:
    """Groups of panels, counted one after the other; of a panel that threads share each computes the factors."""
    num_groups, columns = argument(row, OUTPUT_GROUPS), argument(row, COLUMNS)
    clear_tile(tile)
    current = -1
    for item in range(first, end):
        panel, group = item // num_groups, item % num_groups
        if panel != current:
            current = panel
            for token in range(min(width, argument(row, COLUMN_NUM_TOKENS) - panel * width)):
                source = add_residual(row, panel * width + token)
                store_f32(factors + 4 * token, norm_factor(source, columns, float_argument(row, EPSILON)))
        if width == 1:
            norm_group(row, panel, group, load_f32(factors))
        else:
            norm_panel_group(row, panel, group, width, tile, factors)


@kernel
def rms_norm(thread: int, num_threads: int, row: int) -> None:
    """y = x / sqrt(mean(x^2) + eps) * weight, of x + residual if there is one.

    Items are tokens. For quantized results they are groups of panels, since the tokens of a panel share cache lines;
    with a residual whole panels, because sums may only be written once.
    """
    num_tokens, num_groups = argument(row, COLUMN_NUM_TOKENS), argument(row, OUTPUT_GROUPS)
    if num_groups == 0:
        first, end = chunk_range(thread, num_threads, num_tokens)
        for token in range(first, end):
            norm_token(row, token)
        return
    width = device_panel_width(num_tokens)
    num_panels = (num_tokens + width - 1) // width
    unit = num_groups if argument(row, RESIDUAL) != 0 else 1
    first, end = chunk_range(thread, num_threads, num_panels * num_groups // unit)
    norm_quantized(row, width, first * unit, end * unit, tile_memory(), tile_memory())


def rms_norm_arguments(
    *,
    x: tuple[int, int],
    output: tuple[int, int],
    weight: int,
    columns: int,
    eps: float,
    residual: tuple[int, int] | None = None,
    total: tuple[int, int] | None = None,
    head_dim: int | None = None,
    quantized: bool = False,
) -> tuple[int, ...]:
    """Columns of an `rms_norm` op, which also computes `add_rms_norm`.

    Args:
        x, residual, output: address, and bytes from row to row; the output may be x.
        total: where x + residual goes, if there is a residual; may be either.
        weight: address of float32 [columns], or [head_dim].
        columns: of the rows.
        head_dim: norm over each so many columns, with the same weight; None: over all.
        quantized: the output is an `int8_group32` buffer.

    Raises:
        InvalidParameterError: parts that do not go together.
    """
    if (residual is None) != (total is None):
        raise InvalidParameterError("A residual needs a place for the sum.", field="total")
    if head_dim is not None and (quantized or residual is not None or columns % head_dim):
        raise InvalidParameterError(f"No norm over heads of {head_dim} columns here.", field="head_dim")
    num_groups = -(-columns // GROUP_SIZE) if quantized else 0
    parts = (*x, *(residual or (0, 0)), *(total or (0, 0)), *output)
    return (*parts, num_groups, weight, columns, head_dim or columns, float_bits(eps))
