"""Norm and rotary embedding of heads as one op: against the two, and in triton against the definition."""

from __future__ import annotations

import pytest
import torch

from tests.support.triton_kernels import TOLERANCES, relative_error
from tokenmill.ops.head_norm import HeadNorm, norm_and_rope, norm_and_rope_reference
from tokenmill.ops.rms_norm import rms_norm_reference
from tokenmill.ops.rope import apply_rope_reference

pytest.importorskip("triton")
from tokenmill.ops.triton import head_norm as kernels

SHAPES = [(3, 4, 2, 16), (1, 1, 1, 6), (5, 9, 3, 64)]  # tokens, query heads, key heads, features
REAL = [pytest.param((7, 32, 4, 128), marks=pytest.mark.gpu)]


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, HeadNorm, torch.Tensor, torch.Tensor]:
    """(heads inside a wider tensor, norm, cosines, signed sines)."""
    num_tokens, num_query, num_key, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(num_tokens, num_query + 2 * num_key, head_dim, generator=generator)[:, : num_query + num_key]
    query, key = 1 + 0.3 * torch.randn(2, head_dim, generator=generator)
    angles = torch.randn(num_tokens, head_dim // 2, generator=generator) * 4
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)[:, None]
    signed_sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)[:, None]
    norm = HeadNorm(query.to(device, dtype), key.to(device), 1e-6)
    return heads.to(device, dtype), norm, cos.to(device), signed_sin.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_ops_one_after_the_other(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    heads, norm, cos, signed_sin = inputs(shape, dtype, "cpu")
    num_query = shape[1]
    query, key = norm_and_rope(heads, num_query, norm, cos, signed_sin)
    for actual, part, weight in (
        (query, heads[:, :num_query], norm.query),
        (key, heads[:, num_query:], norm.key),
    ):
        expected = apply_rope_reference(rms_norm_reference(part, weight, 1e-6), cos, signed_sin)
        assert actual.dtype == dtype
        assert relative_error(actual, expected) <= TOLERANCES[dtype]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, *REAL])
def test_triton(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    heads, norm, cos, signed_sin = inputs(shape, dtype, device)
    actual = kernels.norm_and_rope(heads, shape[1], norm.query, norm.key, norm.eps, cos, signed_sin)
    expected = torch.cat(norm_and_rope_reference(heads, shape[1], norm, cos, signed_sin), dim=1)
    assert actual.is_contiguous()
    assert relative_error(actual, expected) <= 2 * TOLERANCES[dtype]


def test_no_tokens() -> None:
    heads, norm, cos, signed_sin = inputs((0, 2, 1, 8), torch.float32, "cpu")
    query, key = norm_and_rope(heads, 2, norm, cos, signed_sin)
    assert query.shape == (0, 2, 8) and key.shape == (0, 1, 8)
    assert kernels.norm_and_rope(heads, 2, norm.query, norm.key, 1e-6, cos, signed_sin).shape == (0, 3, 8)
