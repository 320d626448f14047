"""Maps over rows: add, multiply, scale, copy, select_rows, soft_cap and activations, to float32 or quantized rows.

`elementwise` here and `quantize` in `quantize.py` are told which function by a number of `FUNCTIONS`, so that few
kernels need compiling. `activation.py` chooses between the two.
"""

from __future__ import annotations

from typing import Final

from tokenmill.errors import InvalidParameterError
from tokenmill.ops.cpu.intrinsics import argument, chunk_range, float_argument
from tokenmill.ops.cpu.jit import device, float_bits, kernel
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS, FIRST_ARGUMENT
from tokenmill.ops.cpu.simd import LANES, add, broadcast, load_first, load_i32, multiply, store_first
from tokenmill.ops.cpu.vector_math import gelu_tanh, silu, soft_cap

A: Final = FIRST_ARGUMENT  # address of the first operand
A_STRIDE: Final = FIRST_ARGUMENT + 1
B: Final = FIRST_ARGUMENT + 2  # address of the second one; what is read there does not matter if there is none
B_STRIDE: Final = FIRST_ARGUMENT + 3
OUTPUT: Final = FIRST_ARGUMENT + 4
OUTPUT_STRIDE: Final = FIRST_ARGUMENT + 5  # `quantize`: groups of a token in the buffer
COLUMNS: Final = FIRST_ARGUMENT + 6
FUNCTION: Final = FIRST_ARGUMENT + 7
FACTOR: Final = FIRST_ARGUMENT + 8  # factor of scale, cap of soft_cap
ROW_INDEX: Final = FIRST_ARGUMENT + 9  # address of int32: which row of A each row is made of; 0: the same one

ADD: Final = 0
MULTIPLY: Final = 1
SCALE: Final = 2
COPY: Final = 3
SOFT_CAP: Final = 4
SILU: Final = 5
GELU_TANH: Final = 6
GATED_SILU: Final = 7
GATED_GELU_TANH: Final = 8
FUNCTIONS: Final = {
    "add": ADD,
    "multiply": MULTIPLY,
    "scale": SCALE,
    "copy": COPY,
    "soft_cap": SOFT_CAP,
    "silu": SILU,
    "gelu_pytorch_tanh": GELU_TANH,
    "gated_silu": GATED_SILU,
    "gated_gelu_pytorch_tanh": GATED_GELU_TANH,
}
BINARY: Final = (ADD, MULTIPLY, GATED_SILU, GATED_GELU_TANH)

CHUNK_COLUMNS: Final = 2048
"""Columns of a row that one thread computes at a time."""


@device
def apply(row: int, function: int, a: int, b: int, count: int):  # type: ignore[no-untyped-def]
    """The function of up to 16 values at a (and b); lanes from `count` on mean nothing."""
    x = load_first(a, count)
    if function == COPY:
        return x
    if function == ADD:
        return add(x, load_first(b, count))
    if function == MULTIPLY:
        return multiply(x, load_first(b, count))
    if function == SCALE:
        return multiply(x, broadcast(float_argument(row, FACTOR)))
    if function == SOFT_CAP:
        return soft_cap(x, float_argument(row, FACTOR))
    y = silu(x) if function in (SILU, GATED_SILU) else gelu_tanh(x)
    if function >= GATED_SILU:
        return multiply(y, load_first(b, count))
    return y


@device
def source_row(row: int, token: int) -> int:
    """Address of the row of A that a token's result is made of."""
    index = argument(row, ROW_INDEX)
    if index != 0:
        token = load_i32(index + 4 * token)
    return argument(row, A) + token * argument(row, A_STRIDE)


@kernel
def elementwise(thread: int, num_threads: int, row: int) -> None:
    """float32 results."""
    columns, function = argument(row, COLUMNS), argument(row, FUNCTION)
    chunks_per_row = (columns + CHUNK_COLUMNS - 1) // CHUNK_COLUMNS
    first, end = chunk_range(thread, num_threads, argument(row, COLUMN_NUM_TOKENS) * chunks_per_row)
    for chunk in range(first, end):
        token, begin = chunk // chunks_per_row, chunk % chunks_per_row * CHUNK_COLUMNS
        a = source_row(row, token)
        b = argument(row, B) + token * argument(row, B_STRIDE)
        output = argument(row, OUTPUT) + token * argument(row, OUTPUT_STRIDE)
        for column in range(begin, min(columns, begin + CHUNK_COLUMNS), LANES):
            count = min(LANES, columns - column)
            store_first(output + 4 * column, apply(row, function, a + 4 * column, b + 4 * column, count), count)


def elementwise_arguments(
    function: str,
    *,
    a: tuple[int, int],
    output: tuple[int, int],
    columns: int,
    b: tuple[int, int] | None = None,
    factor: float = 0.0,
    row_index: int = 0,
) -> tuple[int, ...]:
    """Columns of an `elementwise` op.

    Args:
        function: a key of `FUNCTIONS`.
        a, b, output: address, and bytes from row to row; the output may be an operand.
        columns: of all of them.
        factor: of `scale`; the cap of `soft_cap`.
        row_index: address of int32, for `copy`: y[r] = a[row_index[r]].

    Raises:
        InvalidParameterError: no such function, or it needs a second operand.
    """
    number = function_number(function, has_b=b is not None)
    return (*a, *(b or a), *output, columns, number, float_bits(factor), row_index)


def function_number(function: str, *, has_b: bool) -> int:
    """The function's number.

    Raises:
        InvalidParameterError: no such function, or the wrong number of operands.
    """
    if function not in FUNCTIONS:
        raise InvalidParameterError(f"{function!r} is none of {', '.join(FUNCTIONS)}.", field="function")
    if (FUNCTIONS[function] in BINARY) != has_b:
        raise InvalidParameterError(f"{function!r} has {1 if has_b else 2} operands.", field="b")
    return FUNCTIONS[function]
