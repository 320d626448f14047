from __future__ import annotations

import torch

from tokenmill.attention.reference import ReferenceAttention
from tokenmill.layers.context import LayerContext
from tokenmill.layers.norm import GemmaRMSNorm, RMSNorm
from tokenmill.layers.weights import finalize_weights


def context(dtype: torch.dtype = torch.float32) -> LayerContext:
    return LayerContext(dtype=dtype, device=torch.device("cpu"), backend=ReferenceAttention())


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.pow(2).mean(dim=-1, keepdim=True).sqrt()


def test_the_first_norm_starts_the_residual_stream() -> None:
    norm = RMSNorm(8, 1e-12, context())
    norm.weight.data.fill_(3.0)
    x = torch.randn(2, 8)
    normalized, residual = norm.add_and_norm(x, None)
    assert residual is x
    torch.testing.assert_close(normalized, unit(x) * 3.0)


def test_later_norms_add_to_it() -> None:
    norm = RMSNorm(8, 1e-12, context())
    x, stream = torch.randn(2, 4, 8)
    normalized, residual = norm.add_and_norm(x, stream)
    torch.testing.assert_close(residual, x + stream)
    torch.testing.assert_close(normalized, unit(x + stream))


def test_gemma_weight_zero_is_the_identity_before_and_after_finalize() -> None:
    norm = GemmaRMSNorm(8, 1e-12, context())
    x = torch.randn(2, 8)
    torch.testing.assert_close(norm(x), unit(x))
    norm.weight.data.fill_(0.5)
    torch.testing.assert_close(norm(x), unit(x) * 1.5)
    finalize_weights(norm)
    torch.testing.assert_close(norm(x), unit(x) * 1.5)


def test_gemma_weight_is_not_rounded_when_one_is_added() -> None:
    """1 + 2^-9 is 1 in bfloat16; the factor must be kept in float32."""
    norm = GemmaRMSNorm(4, 1e-6, context(torch.bfloat16))
    norm.weight.data.fill_(2.0**-9)
    finalize_weights(norm)
    assert norm.scale.dtype == torch.float32
    assert torch.equal(norm.scale, torch.full((4,), 1.0 + 2.0**-9))
    assert norm(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
