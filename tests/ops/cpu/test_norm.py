"""RMS norm kernels against the reference op."""

from __future__ import annotations

import pytest
import torch

from tests.support.int8_groups import dequantized
from tests.support.native_ops import matrix, nans, run_equally, run_ops
from tokenmill.errors import InvalidParameterError
from tokenmill.ops.cpu.layout import int8_group32_bytes
from tokenmill.ops.cpu.norm import rms_norm, rms_norm_arguments
from tokenmill.ops.rms_norm import rms_norm_reference


@pytest.mark.parametrize(("tokens", "columns"), [(1, 576), (3, 33), (17, 8), (5, 2048)])
def test_norm_of_rows_in_a_wider_buffer(tokens: int, columns: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, columns + 5) * 3, torch.randn(columns)

    def compute(num_threads: int) -> torch.Tensor:
        y = nans(tokens, columns)
        arguments = rms_norm_arguments(
            x=matrix(x, 2), output=matrix(y), weight=weight.data_ptr(), columns=columns, eps=1e-5
        )
        run_ops([(rms_norm, arguments)], tokens, num_threads)
        return y

    expected = rms_norm_reference(x[:, 2 : 2 + columns], weight, 1e-5)
    torch.testing.assert_close(run_equally(compute), expected, rtol=1e-6, atol=1e-6)


def test_norm_over_heads_in_place() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 3 * 24), torch.randn(24)
    expected = rms_norm_reference(x.view(7, 3, 24), weight, 1e-6).flatten(1)
    arguments = rms_norm_arguments(
        x=matrix(x), output=matrix(x), weight=weight.data_ptr(), columns=72, eps=1e-6, head_dim=24
    )
    run_ops([(rms_norm, arguments)], 7)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 4, 21])
def test_add_and_norm_with_the_sum_in_place(tokens: int) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(tokens, 100), torch.randn(tokens, 100), torch.randn(100)
    expected_sum = x + residual

    def compute(num_threads: int) -> torch.Tensor:
        y, total = nans(tokens, 100), residual.clone()
        arguments = rms_norm_arguments(
            x=matrix(x),
            residual=matrix(total),
            total=matrix(total),
            output=matrix(y),
            weight=weight.data_ptr(),
            columns=100,
            eps=1e-5,
        )
        run_ops([(rms_norm, arguments)], tokens, num_threads)
        assert torch.equal(total, expected_sum)
        return y

    torch.testing.assert_close(
        run_equally(compute), rms_norm_reference(expected_sum, weight, 1e-5), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("tokens", [1, 3, 7, 16, 18])
@pytest.mark.parametrize("columns", [576, 40])
def test_quantized_norm(tokens: int, columns: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, columns), torch.randn(columns)

    def compute(num_threads: int) -> torch.Tensor:
        y = torch.zeros(int8_group32_bytes(tokens, columns), dtype=torch.uint8)
        arguments = rms_norm_arguments(
            x=matrix(x), output=(y.data_ptr(), 0), weight=weight.data_ptr(), columns=columns, eps=1e-5, quantized=True
        )
        run_ops([(rms_norm, arguments)], tokens, num_threads)
        return y

    expected = rms_norm_reference(x, weight, 1e-5)
    values, sums = dequantized(run_equally(compute), tokens, columns)
    padded = torch.nn.functional.pad(expected, (0, -columns % 32)).view(tokens, -1, 32)
    half_step = padded.abs().amax(-1, keepdim=True) / 127 / 2
    assert torch.all((values - padded).abs() <= half_step * 1.001)
    torch.testing.assert_close(sums, values.sum(-1), rtol=1e-5, atol=1e-5)


def test_parts_must_go_together() -> None:
    with pytest.raises(InvalidParameterError, match="sum"):
        rms_norm_arguments(x=(0, 0), output=(0, 0), weight=0, columns=32, eps=0.0, residual=(0, 0))
    with pytest.raises(InvalidParameterError, match="heads of 24"):
        rms_norm_arguments(x=(0, 0), output=(0, 0), weight=0, columns=32, eps=0.0, head_dim=24)
