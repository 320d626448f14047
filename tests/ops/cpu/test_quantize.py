"""Quantization to `int8_group32`."""

from __future__ import annotations

import pytest
import torch

from tests.support.int8_groups import dequantized
from tests.support.native_ops import matrix, run_equally, run_ops
from tokenmill.ops.cpu.layout import int8_group32_bytes
from tokenmill.ops.cpu.quantize import quantize, quantize_arguments


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("columns", [576, 31, 300])
def test_values_are_the_nearest_ones(tokens: int, columns: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, columns) * torch.logspace(-6, 3, tokens)[:, None]
    x[0, :20] = 0.0

    def compute(num_threads: int) -> torch.Tensor:
        y = torch.zeros(int8_group32_bytes(tokens, columns), dtype=torch.uint8)
        arguments = quantize_arguments(a=matrix(x), output=y.data_ptr(), columns=columns)
        run_ops([(quantize, arguments)], tokens, num_threads)
        return y

    values, sums = dequantized(run_equally(compute), tokens, columns)
    groups = torch.nn.functional.pad(x, (0, -columns % 32)).view(tokens, -1, 32)
    half_step = groups.abs().amax(-1, keepdim=True) / 127 / 2
    assert torch.all((values - groups).abs() <= half_step * 1.001)
    assert torch.all(values[groups == 0] == 0)
    torch.testing.assert_close(sums, values.double().sum(-1).float(), rtol=1e-5, atol=1e-7)


def test_a_group_of_zeros_is_exact() -> None:
    x = torch.zeros(1, 64)
    x[0, 32:] = 1.0
    y = torch.full((int8_group32_bytes(1, 64),), 255, dtype=torch.uint8)
    run_ops([(quantize, quantize_arguments(a=matrix(x), output=y.data_ptr(), columns=64))], 1)
    values, sums = dequantized(y, 1, 64)
    assert torch.equal(values.view(1, 64), x)
    torch.testing.assert_close(sums, torch.tensor([[0.0, 32.0]]))
