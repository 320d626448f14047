"""Elementwise and quantizing kernels against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from tests.support.native_ops import matrix, nans, run_equally, run_ops
from tokenmill.errors import InvalidParameterError
from tokenmill.ops.cpu.elementwise import elementwise, elementwise_arguments

UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "copy": lambda x: x,
    "scale": lambda x: x * 2.5,
    "soft_cap": lambda x: 2.5 * torch.tanh(x / 2.5),
}
BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"add": torch.add, "multiply": torch.mul}


@pytest.mark.parametrize("function", UNARY)
@pytest.mark.parametrize(("rows", "columns"), [(1, 5000), (3, 47)])
def test_one_operand(function: str, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, columns) * 4

    def compute(num_threads: int) -> torch.Tensor:
        y = nans(rows, columns)
        arguments = elementwise_arguments(function, a=matrix(x), output=matrix(y), columns=columns, factor=2.5)
        run_ops([(elementwise, arguments)], rows, num_threads)
        return y

    torch.testing.assert_close(run_equally(compute), UNARY[function](x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", BINARY)
def test_two_operands_in_place(function: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 100), torch.randn(4, 130)
    expected = BINARY[function](a, b[:, 30:])
    arguments = elementwise_arguments(function, a=matrix(a), b=matrix(b, 30), output=matrix(a), columns=100)
    run_ops([(elementwise, arguments)], 4)
    assert torch.equal(a, expected)


def test_selected_rows() -> None:
    x, index = torch.randn(9, 70), torch.tensor([8, 0, 8, 3], dtype=torch.int32)

    def compute(num_threads: int) -> torch.Tensor:
        y = nans(4, 70)
        arguments = elementwise_arguments("copy", a=matrix(x), output=matrix(y), columns=70, row_index=index.data_ptr())
        run_ops([(elementwise, arguments)], 4, num_threads)
        return y

    assert torch.equal(run_equally(compute), x[index.long()])


def test_nothing_beyond_the_columns_is_touched() -> None:
    x = torch.ones(3, 20)
    y = torch.zeros(3, 40)
    arguments = elementwise_arguments("copy", a=matrix(x), output=matrix(y, 7), columns=20)
    run_ops([(elementwise, arguments)], 3)
    assert torch.equal(y, functional.pad(x, (7, 13)))


def test_unknown_functions_and_missing_operands_are_refused() -> None:
    with pytest.raises(InvalidParameterError, match="none of"):
        elementwise_arguments("divide", a=(0, 0), output=(0, 0), columns=1)
    with pytest.raises(InvalidParameterError, match="2 operands"):
        elementwise_arguments("add", a=(0, 0), output=(0, 0), columns=1)
