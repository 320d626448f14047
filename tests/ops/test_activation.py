from __future__ import annotations

import math

import pytest
import torch

from tests.support.triton_kernels import without_triton
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.ops.activation import IMPLEMENTATIONS, gated_activation


def exact(name: str, gate: float) -> float:
    if name == "silu":
        return gate / (1.0 + math.exp(-gate))
    return 0.5 * gate * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)))


CASES = [(name, implementation) for name, table in IMPLEMENTATIONS.items() for implementation in without_triton(table)]


@pytest.mark.parametrize(("name", "implementation"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_every_implementation(name: str, implementation: str, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(3, 14, generator=generator) * 3).to(dtype)
    gate, up = gate_up[:, :7].double(), gate_up[:, 7:].double()
    expected = torch.tensor([[exact(name, value) for value in row] for row in gate.tolist()], dtype=torch.float64) * up
    actual = IMPLEMENTATIONS[name][implementation](gate_up)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_choice_by_hugging_face_name(name: str) -> None:
    function = gated_activation(name, torch.device("cpu"), torch.float32)
    assert function in IMPLEMENTATIONS[name].values()


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match="relu6") as error:
        gated_activation("relu6", torch.device("cpu"), torch.float32)
    assert error.value.field == "hidden_act"
    assert "silu" in str(error.value)
