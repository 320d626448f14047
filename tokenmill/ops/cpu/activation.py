"""The ops `activation` and `gated_activation`, with float32 or `int8_group32` results: which kernel, and its row."""

from __future__ import annotations

from tokenmill.ops.cpu.elementwise import elementwise, elementwise_arguments
from tokenmill.ops.cpu.jit import NativeFunction
from tokenmill.ops.cpu.quantize import quantize, quantize_arguments


def activation_op(
    activation: str,
    *,
    x: tuple[int, int],
    output: tuple[int, int],
    columns: int,
    up: tuple[int, int] | None = None,
    quantized: bool = False,
) -> tuple[NativeFunction, tuple[int, ...]]:
    """The kernel that computes activation(x), or activation(x) * up, and the columns of its row.

    Args:
        activation: silu or gelu_pytorch_tanh.
        x, up, output: address, and bytes from row to row (not read for a quantized output).
        columns: of the result.
        quantized: the output is an `int8_group32` buffer.

    Raises:
        InvalidParameterError: no such activation.
    """
    function = activation if up is None else f"gated_{activation}"
    if quantized:
        return quantize, quantize_arguments(a=x, b=up, output=output[0], columns=columns, function=function)
    return elementwise, elementwise_arguments(function, a=x, b=up, output=output, columns=columns)
