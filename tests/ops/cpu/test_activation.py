"""Activations and gated activations against torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.support.int8_groups import dequantized
from tests.support.native_ops import matrix, nans, run_equally, run_ops
from tokenmill.errors import InvalidParameterError
from tokenmill.ops.cpu.activation import activation_op
from tokenmill.ops.cpu.layout import int8_group32_bytes

ACTIVATIONS = {"silu": functional.silu, "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_float_results(activation: str, gated: bool) -> None:
    torch.manual_seed(0)
    x, up = torch.randn(5, 75) * 5, torch.randn(5, 75)
    x[0, 0], x[0, 1] = -200.0, 200.0

    def compute(num_threads: int) -> torch.Tensor:
        y = nans(5, 75)
        operation = activation_op(
            activation, x=matrix(x), up=matrix(up) if gated else None, output=matrix(y), columns=75
        )
        run_ops([operation], 5, num_threads)
        return y

    expected = ACTIVATIONS[activation](x) * (up if gated else 1.0)
    torch.testing.assert_close(run_equally(compute), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_quantized_results_of_a_gate_in_one_buffer(activation: str) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(6, 2 * 72)

    def compute(num_threads: int) -> torch.Tensor:
        y = torch.zeros(int8_group32_bytes(6, 72), dtype=torch.uint8)
        operation = activation_op(
            activation,
            x=matrix(gate_up),
            up=matrix(gate_up, 72),
            output=(y.data_ptr(), 0),
            columns=72,
            quantized=True,
        )
        run_ops([operation], 6, num_threads)
        return y

    expected = ACTIVATIONS[activation](gate_up[:, :72]) * gate_up[:, 72:]
    values, _ = dequantized(run_equally(compute), 6, 72)
    groups = functional.pad(expected, (0, 24)).view(6, 3, 32)
    half_step = groups.abs().amax(-1, keepdim=True) / 127 / 2
    assert torch.all((values - groups).abs() <= half_step * 1.01)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="relu"):
        activation_op("relu", x=(0, 0), output=(0, 0), columns=1)
