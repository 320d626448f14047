"""The int8 linear kernels against float64 products of the same quantized numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.packed_linear import LinearRun, make_weight, quantize_activations, read_activations
from tokenmill.errors import InvalidParameterError, UnsupportedFeatureError
from tokenmill.ops.cpu.cpu_features import DotProduct, supported_dot_products
from tokenmill.ops.cpu.linear_int8 import Activations, LinearWeight, Matrix, linear_arguments, linear_kernel
from tokenmill.ops.cpu.packing import FORMATS, PackedWeight

TOLERANCE = 2e-6
"""Of the largest result: float32 sums of some dozen groups."""


def random_tokens(tokens: int, columns: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((tokens, columns)).astype(np.float32)


def assert_close(y: Any, expected: Any) -> None:
    assert y.shape == expected.shape
    assert np.abs(y - expected).max() <= TOLERANCE * np.abs(expected).max()


def activate(name: str, gate: Any) -> Any:
    if name == "silu":
        return gate / (1 + np.exp(-gate))
    return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))


@pytest.mark.spec("E4")
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 35])
def test_products_are_those_of_the_quantized_numbers(weight_format: str, tokens: int) -> None:
    weight, values = make_weight(weight_format, 80, 512)
    x, x_values = quantize_activations(random_tokens(tokens, 512))
    assert_close(LinearRun(weight, x, tokens).run(), x_values @ values.T)


@pytest.mark.parametrize("way", supported_dot_products())
@pytest.mark.parametrize("weight_format", ["q4_1", "int8_group32"])
@pytest.mark.parametrize("tokens", [1, 19])
def test_every_way_to_compute_gives_the_same_products(way: DotProduct, weight_format: str, tokens: int) -> None:
    weight, values = make_weight(weight_format, 33, 256)
    x, x_values = quantize_activations(random_tokens(tokens, 256))
    y = LinearRun(weight, x, tokens).run(way=way)
    assert_close(y, x_values @ values.T)
    np.testing.assert_allclose(y, LinearRun(weight, x, tokens).run(), rtol=1e-5, atol=1e-5)


def test_the_largest_values_do_not_overflow() -> None:
    columns = 1024
    weight, values = make_weight("int8_group32", 32, columns)
    weight.data.reshape(2, 32, -1)[:, :, 32:] = 255  # every value 127
    scales = weight.data.reshape(2, 32, -1)[:, :, :32].view(np.float16).astype(np.float64)
    x = np.full((3, columns), -2.5, np.float32)
    buffer, x_values = quantize_activations(x)
    expected = (127.0 * scales * x_values[0].reshape(1, -1, 32)[:, :, :1] * 32).sum(axis=1).reshape(-1)
    for way in supported_dot_products():
        y = LinearRun(weight, buffer, 3).run(way=way)
        assert_close(y, np.tile(expected, (3, 1)))
    assert values.shape == (32, columns)


@pytest.mark.parametrize("weight_format", ["q4_0", "q6_k"])
def test_results_are_bitwise_equal_for_any_number_of_threads(weight_format: str) -> None:
    weight, _ = make_weight(weight_format, 176, 256)
    for tokens in (1, 7, 300):
        x, _ = quantize_activations(random_tokens(tokens, 256))
        one, two, three = (LinearRun(weight, x, tokens).run(num_threads=number).tobytes() for number in (1, 2, 3))
        assert one == two == three


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_token_gets_bitwise_the_same_result_in_any_batch(weight_format: str) -> None:
    weight, _ = make_weight(weight_format, 40, 1792)  # more columns than one group block
    tokens = random_tokens(19, 1792)
    alone = [LinearRun(weight, quantize_activations(tokens[i : i + 1])[0], 1).run()[0] for i in range(19)]
    for count in (2, 7, 19):
        together = LinearRun(weight, quantize_activations(tokens[:count])[0], count).run()
        assert together.tobytes() == np.stack(alone[:count]).tobytes()


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("columns", [1, 31, 33, 70])
def test_columns_need_not_fill_groups(tokens: int, columns: int) -> None:
    for weight_format in ("int8_group32", "int8_channel"):
        weight, values = make_weight(weight_format, 5, columns)
        x, x_values = quantize_activations(random_tokens(tokens, columns))
        assert_close(LinearRun(weight, x, tokens).run(), x_values @ values.T)


@pytest.mark.parametrize("tokens", [1, 9])
def test_bias_and_residual_are_added(tokens: int) -> None:
    weight, values = make_weight("q8_0", 50, 96)
    x, x_values = quantize_activations(random_tokens(tokens, 96))
    bias, residual = random_tokens(1, 50, 2)[0], random_tokens(tokens, 50, 3)
    y = LinearRun(weight, x, tokens, bias=bias, residual=residual).run()
    assert_close(y, x_values @ values.T + bias + residual)


def test_some_columns_of_wider_activations_are_read() -> None:
    weight, values = make_weight("q4_0", 16, 64)
    for tokens in (1, 5):
        x, x_values = quantize_activations(random_tokens(tokens, 160))
        y = LinearRun(weight, x, tokens, first_group=2, x_groups=5).run()
        assert_close(y, x_values[:, 64:128] @ values.T)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("weight_format", ["q4_1", "int8_channel"])
@pytest.mark.parametrize("tokens", [1, 3, 21])
def test_gated_activation(activation: str, weight_format: str, tokens: int) -> None:
    weight, values = make_weight(weight_format, 2 * 56, 128, gated=True)
    x, x_values = quantize_activations(random_tokens(tokens, 128))
    bias = random_tokens(1, 112, 2)[0]
    gate, up = np.split(x_values @ values.T + bias, 2, axis=1)
    y = LinearRun(weight, x, tokens, bias=bias, activation=activation).run()
    assert_close(y, activate(activation, gate) * up)


@pytest.mark.parametrize("tokens", [1, 3, 21])
def test_gated_activation_is_quantized_in_the_kernel(tokens: int) -> None:
    weight, _ = make_weight("q4_1", 2 * 72, 128, gated=True)
    x, _ = quantize_activations(random_tokens(tokens, 128))
    run = LinearRun(weight, x, tokens, activation="silu")
    plain = run.run()
    for num_threads in (1, 2):
        integers, scales, sums = read_activations(run.run(quantized=True, num_threads=num_threads), tokens, 72)
        expected, _ = quantize_activations(plain)
        expected_integers, expected_scales, _ = read_activations(expected, tokens, 72)
        np.testing.assert_allclose(scales, expected_scales, rtol=1e-6)
        assert np.abs(integers - expected_integers.astype(np.int32)).max() <= 1  # a tie may fall to either side
        assert (integers != expected_integers).mean() < 0.01
        padded = np.zeros((tokens, 96), np.int64)
        padded[:, :72] = integers
        np.testing.assert_allclose(sums, scales * padded.reshape(tokens, 3, 32).sum(axis=-1), rtol=1e-5, atol=1e-7)


def test_zeros_stay_zeros() -> None:
    weight, _ = make_weight("q4_1", 2 * 32, 64, gated=True)
    x, _ = quantize_activations(np.zeros((4, 64), np.float32))
    buffer = LinearRun(weight, x, 4, activation="silu").run(quantized=True)
    assert not buffer.any()


def arguments(weight: PackedWeight, **changes: Any) -> tuple[int, ...]:
    width = LinearWeight(64, weight.format, weight.num_rows, weight.num_columns, weight.gated)
    given: dict[str, Any] = {"weight": width, "x": Activations(64, 2), "y": Matrix(64, 256), "scratch": 64, **changes}
    return linear_arguments(given.pop("weight"), given.pop("x"), given.pop("y"), given.pop("scratch"), **given)


def test_parts_that_do_not_fit_are_refused() -> None:
    plain, _ = make_weight("q8_0", 64, 64)
    gated, _ = make_weight("q8_0", 64, 64, gated=True)
    assert arguments(plain)
    with pytest.raises(InvalidParameterError, match="needs an activation"):
        arguments(gated)
    with pytest.raises(InvalidParameterError, match="needs an activation"):
        arguments(plain, activation="silu")
    with pytest.raises(InvalidParameterError, match="'relu' is not known"):
        arguments(gated, activation="relu")
    with pytest.raises(InvalidParameterError, match="adds no residual"):
        arguments(gated, activation="silu", residual=Matrix(64, 256))
    with pytest.raises(InvalidParameterError, match="Only gated"):
        arguments(plain, y=Activations(64, 2))
    with pytest.raises(InvalidParameterError, match="x has 1 groups, the weight reads 2"):
        arguments(plain, x=Activations(64, 1))
    with pytest.raises(InvalidParameterError, match="first group"):
        arguments(gated, activation="silu", y=Activations(64, 3, 1))
    with pytest.raises(UnsupportedFeatureError, match="'iq4_nl'"):
        linear_kernel("iq4_nl", one_token=True)
