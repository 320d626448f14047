from __future__ import annotations

import pytest
import torch

from tests.support.triton_kernels import without_triton
from tokenmill.ops.rms_norm import IMPLEMENTATIONS, add_rms_norm, choose, rms_norm

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def exact(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """float64, one row at a time, from the formula."""
    rows = [row / (sum(value * value for value in row) / len(row) + eps) ** 0.5 for row in x.double().flatten(0, -2)]
    return torch.stack(rows).view(x.shape) * weight.double()


@pytest.mark.parametrize("name", without_triton(IMPLEMENTATIONS))
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 33), (3, 2, 64)])
def test_every_implementation(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    actual = IMPLEMENTATIONS[name](x, weight, 1e-3)
    assert actual.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(actual.double(), exact(x, weight, 1e-3), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", without_triton(IMPLEMENTATIONS))
def test_eps_and_tiny_input(name: str) -> None:
    """With an input far below sqrt(eps), the result is x / sqrt(eps), and zero stays zero."""
    x = torch.tensor([[1e-6, -2e-6], [0.0, 0.0]])
    actual = IMPLEMENTATIONS[name](x, torch.ones(2), 1e-4)
    torch.testing.assert_close(actual, x * 100, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("name", without_triton(IMPLEMENTATIONS))
def test_bfloat16_input_is_squared_in_float32(name: str) -> None:
    """Squares of large bfloat16 values sum without overflow or loss of the small ones."""
    x = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    x[0, 0] = 2.0**40
    actual = IMPLEMENTATIONS[name](x, torch.ones(4096, dtype=torch.bfloat16), 1e-6)
    assert actual[0, 0].item() == pytest.approx(64.0, rel=1e-2)


@pytest.mark.parametrize("name", without_triton(IMPLEMENTATIONS))
def test_float32_weight_with_a_narrow_input(name: str) -> None:
    """The product is formed in float32: 1 + 2^-10 would be 1 in bfloat16, and is not lost before the product."""
    x = torch.tensor([[3.0, 3.0]], dtype=torch.bfloat16)
    weight = torch.tensor([1.0 + 2**-10, 0.25])
    actual = IMPLEMENTATIONS[name](x, weight, 1e-6)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), torch.tensor([[1.0, 0.25]]), atol=1e-2, rtol=0.0)


def test_add_rms_norm_returns_norm_and_sum() -> None:
    generator = torch.Generator().manual_seed(1)
    x, residual = torch.randn(2, 4, 16, generator=generator)
    before = x.clone(), residual.clone()
    normalized, total = add_rms_norm(x, residual, torch.full((16,), 2.0), 1e-5)
    torch.testing.assert_close(total, before[0] + before[1])
    torch.testing.assert_close(normalized.double(), exact(total, torch.full((16,), 2.0), 1e-5), atol=1e-6, rtol=1e-6)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_the_chosen_implementation_exists() -> None:
    name = choose(torch.device("cpu"), torch.bfloat16)
    x = torch.randn(2, 8)
    torch.testing.assert_close(rms_norm(x, torch.ones(8), 1e-5), IMPLEMENTATIONS[name](x, torch.ones(8), 1e-5))
