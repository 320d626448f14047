"""The sum of experts in the launch of the norm behind it: the same as one after the other."""

from __future__ import annotations

import pytest
import torch

from tests.support.triton_kernels import TOLERANCES, relative_error
from tokenmill.attention.reference import ReferenceAttention
from tokenmill.layers.context import LayerContext
from tokenmill.layers.norm import RMSNorm
from tokenmill.ops.expert_sum import PendingSum, summed
from tokenmill.ops.fp8 import QuantizedRows
from tokenmill.quantization.base import RowForm

pytest.importorskip("triton")
from tokenmill.ops.triton.expert_sum import sum_and_norm
from tokenmill.ops.triton.rms_norm import add_rms_norm, add_rms_norm_fp8

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.spec("E2")]
SHAPES = [(1, 2, 16), (5, 3, 40), (3, 8, 64), (0, 2, 16)]  # tokens, experts of a token, features
REAL = [pytest.param((tokens, 8, 2048), marks=pytest.mark.gpu) for tokens in (5, 256, 1000)]
BF16 = torch.bfloat16


def inputs(shape: tuple[int, int, int], device: str) -> tuple[PendingSum, torch.Tensor, torch.Tensor]:
    """(what experts give, residual stream, factors of the norm)."""
    num_tokens, top_k, size = shape
    generator = torch.Generator().manual_seed(0)
    of_pairs = torch.randn(num_tokens * top_k, size, generator=generator).to(device, BF16)
    experts = torch.randint(0, 9, (num_tokens, top_k), generator=generator, dtype=torch.int32).to(device)
    residual = torch.randn(num_tokens, size, generator=generator).to(device, BF16)
    factors = (1 + 0.3 * torch.randn(size, generator=generator)).to(device, BF16)
    return PendingSum(of_pairs, experts, 0, 9), residual, factors


@pytest.mark.parametrize("shape", [*SHAPES, *REAL])
def test_sum_and_norm(shape: tuple[int, int, int], device: str) -> None:
    added, residual, factors = inputs(shape, device)
    expected, stream = add_rms_norm(added.total(), residual, factors, 1e-6)
    plain = sum_and_norm(added.of_pairs, residual, factors, 1e-6, quantizes=False)
    assert plain.scales is None
    assert relative_error(plain.total, stream) <= TOLERANCES[BF16]
    assert relative_error(plain.norm, expected) <= TOLERANCES[BF16]
    quantized = sum_and_norm(added.of_pairs, residual, factors, 1e-6, quantizes=True)
    assert quantized.scales is not None
    assert torch.equal(quantized.total, plain.total)
    values, scales, _ = add_rms_norm_fp8(added.total(), residual, factors, 1e-6)
    torch.testing.assert_close(quantized.scales, scales, rtol=1e-2, atol=0)
    assert relative_error(quantized.norm, values) <= 1e-2  # where a sum in another order is rounded the other way


def test_a_sum_that_is_wanted_as_it_is(device: str) -> None:
    added, _, _ = inputs((5, 3, 40), device)
    expected = added.of_pairs.double().view(5, 3, 40).sum(dim=1)
    assert relative_error(summed(added), expected) <= TOLERANCES[BF16]
    assert summed(expected) is expected


@pytest.mark.parametrize("form", list(RowForm))
def test_a_norm_takes_a_sum_for_each_consumer(form: RowForm, device: str) -> None:
    """Quantized rows for one that takes them, else plain ones; the residual stream is the same."""

    class Consumer:
        def row_form(self, x: torch.Tensor) -> RowForm:
            assert x.shape == (5, 40)
            return form

    added, residual, factors = inputs((5, 3, 40), device)
    norm = RMSNorm(40, 1e-6, LayerContext(dtype=BF16, device=torch.device(device), backend=ReferenceAttention()))
    norm.weight.data.copy_(factors)
    rows, stream = norm.add_and_norm_for(Consumer(), added, residual)
    plain, plain_stream = norm.add_and_norm(added, residual)
    assert torch.equal(stream, plain_stream)
    if form is RowForm.QUANTIZED:
        assert isinstance(rows, QuantizedRows)
        rows = rows.values.float() * rows.scales[:, None]
        assert relative_error(rows, plain) < 0.05
    else:
        assert isinstance(rows, torch.Tensor) and torch.equal(rows, plain)
