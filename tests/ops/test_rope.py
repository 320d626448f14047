from __future__ import annotations

import cmath

import pytest
import torch

from tests.support.triton_kernels import without_triton
from tokenmill.ops.rope import IMPLEMENTATIONS, apply_rope


def angles_to_inputs(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, signed sin) [T, 1, D] of angles [T, D / 2]."""
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)[:, None]
    signed_sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)[:, None]
    return cos, signed_sin


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Each pair (i, i + D/2) as one complex number times e^(i angle), in Python's double precision."""
    result = x.double().clone()
    half = x.shape[-1] // 2
    for token, heads in enumerate(x.double().tolist()):
        for head, values in enumerate(heads):
            for pair in range(half):
                number = complex(values[pair], values[pair + half]) * cmath.exp(1j * float(angles[token, pair]))
                result[token, head, pair], result[token, head, pair + half] = number.real, number.imag
    return result


@pytest.mark.parametrize("name", without_triton(IMPLEMENTATIONS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_every_implementation(name: str, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 10, generator=generator).to(dtype)
    angles = torch.randn(4, 5, generator=generator) * 4
    actual = IMPLEMENTATIONS[name](x, *angles_to_inputs(angles))
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.double(), turned(x, angles), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", without_triton(IMPLEMENTATIONS))
def test_heads_inside_a_wider_tensor(name: str) -> None:
    """Query and key heads are a slice of the merged projection; the rest is not touched."""
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(3, 6, 8, generator=generator)
    before = qkv.clone()
    angles = torch.randn(3, 4, generator=generator)
    actual = IMPLEMENTATIONS[name](qkv[:, 1:4], *angles_to_inputs(angles))
    torch.testing.assert_close(actual.double(), turned(before[:, 1:4], angles), atol=1e-6, rtol=1e-6)
    assert torch.equal(qkv, before)


def test_angle_zero_is_the_identity() -> None:
    x = torch.randn(2, 2, 6)
    assert torch.equal(apply_rope(x, *angles_to_inputs(torch.zeros(2, 3))), x)
