"""Norms and activations quantize their result, or are left to the product, where the layer that follows has it so."""

from __future__ import annotations

import pytest
import torch

from tests.support.row_forms import give_no_quantized_rows
from tokenmill.attention.reference import ReferenceAttention
from tokenmill.checkpoints.loading import fill_dummy
from tokenmill.layers.context import LayerContext
from tokenmill.layers.linear import MergedColumnLinear, QKVLinear
from tokenmill.layers.mlp import GatedMLP
from tokenmill.layers.norm import GemmaRMSNorm, RMSNorm
from tokenmill.layers.weights import finalize_weights, weight_targets
from tokenmill.ops.fp8 import QuantizedRows
from tokenmill.ops.row_product import PendingNorm
from tokenmill.quantization.select import linear_method_for

HIDDEN, INTERMEDIATE = 16, 24


def context(quantization: str | None) -> LayerContext:
    return LayerContext(
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        backend=ReferenceAttention(),
        linear_method=linear_method_for(quantization),  # type: ignore[arg-type]
        prefix="block",
    )


def filled(layer: torch.nn.Module) -> torch.nn.Module:
    fill_dummy(weight_targets(layer), seed=0)
    finalize_weights(layer)
    return layer


def rows(count: int, width: int = HIDDEN) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count)).bfloat16()


@pytest.mark.parametrize("num_rows", [0, 1, 5])
@pytest.mark.parametrize("has_residual", [False, True])
def test_a_norm_hands_rows_in_the_form_that_its_consumer_takes(num_rows: int, has_residual: bool) -> None:
    norm = RMSNorm(HIDDEN, 1e-5, context("fp8"))
    norm.weight.data.normal_()
    consumer = filled(QKVLinear(HIDDEN, 2, 1, 8, bias=False, context=context("fp8")))
    assert isinstance(consumer, QKVLinear)
    x, residual = rows(num_rows), rows(num_rows + 1)[:num_rows] if has_residual else None
    normalized, stream = norm.add_and_norm_for(consumer, x, residual)
    plain, plain_stream = norm.add_and_norm(x, residual)
    assert isinstance(normalized, QuantizedRows) == (num_rows != 1)  # one row is multiplied as it is
    assert torch.equal(stream, plain_stream)
    assert torch.equal(consumer(normalized), consumer(plain))
    assert consumer(normalized).shape == (num_rows, 4, 8)


def test_a_norm_before_plain_weights_gives_plain_rows() -> None:
    norm = RMSNorm(HIDDEN, 1e-5, context(None))
    consumer = MergedColumnLinear(HIDDEN, {"a": 4}, bias=False, context=context(None))
    normalized, _ = norm.add_and_norm_for(consumer, rows(3), None)
    assert isinstance(normalized, torch.Tensor)


@pytest.mark.parametrize("num_rows", [0, 1, 5])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_an_mlp_gives_the_same_however_its_rows_are_quantized(
    num_rows: int, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = filled(GatedMLP(HIDDEN, INTERMEDIATE, activation, bias=False, context=context("fp8")))
    x = rows(num_rows)
    in_passing = mlp(x)
    give_no_quantized_rows(monkeypatch)
    assert torch.equal(in_passing, mlp(x))


@pytest.fixture
def _fusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row's norm and activation are left to its product, as on a GPU."""
    monkeypatch.setattr("tokenmill.quantization.fp8.can_fuse", lambda x, weight: x.shape[0] == 1)


@pytest.mark.usefixtures("_fusing")
@pytest.mark.parametrize("has_residual", [False, True])
def test_a_norm_is_left_to_the_product_of_one_row(has_residual: bool) -> None:
    norm = RMSNorm(HIDDEN, 1e-5, context("fp8"))
    norm.weight.data.normal_()
    consumers = [
        filled(QKVLinear(HIDDEN, 2, 1, 8, bias=True, context=context("fp8"))),
        filled(GatedMLP(HIDDEN, INTERMEDIATE, "silu", bias=False, context=context("fp8"))),
    ]
    for consumer in consumers:
        x, residual = rows(1), rows(2)[:1] if has_residual else None
        plain, plain_stream = norm.add_and_norm(x, residual)
        left, stream = norm.add_and_norm_for(consumer, x, residual)  # type: ignore[arg-type]
        assert isinstance(left, PendingNorm)
        product = consumer(left)
        assert torch.equal(stream, plain_stream)
        torch.testing.assert_close(product, consumer(plain), rtol=3e-2, atol=3e-2)
        assert not isinstance(norm.add_and_norm_for(consumer, rows(3), None)[0], PendingNorm)  # type: ignore[arg-type]


def test_a_norm_of_another_type_is_not_left_to_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.quantization.fp8.can_fuse", lambda x, weight: x.shape[0] == 1)
    consumer = filled(QKVLinear(HIDDEN, 2, 1, 8, bias=False, context=context("fp8")))
    norm = GemmaRMSNorm(HIDDEN, 1e-5, context("fp8"))  # its factors are float32
    assert isinstance(norm.add_and_norm_for(consumer, rows(1), None)[0], torch.Tensor)  # type: ignore[arg-type]


def test_rows_that_were_quantized_for_another_layer_are_a_mistake() -> None:
    layer = filled(MergedColumnLinear(HIDDEN, {"a": 4}, bias=False, context=context(None)))
    with pytest.raises(AssertionError, match="another layer"):
        layer(QuantizedRows(rows(2).to(torch.float8_e4m3fn), torch.ones(2)))
