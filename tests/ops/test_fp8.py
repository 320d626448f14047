from __future__ import annotations

import pytest
import torch

from tests.support.triton_kernels import relative_error
from tokenmill.ops.fp8 import (
    FP8_DTYPE,
    Fp8Weight,
    choose,
    per_token_quantize_fp8,
    scaled_linear,
    weight_only_linear,
)


def nearest_fp8(value: float) -> float:
    """The nearest number of float8_e4m3fn, ties to even, by trying all of them."""
    table = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).float()
    candidates = [(abs(number - value), code & 1, number) for code, number in enumerate(table.tolist())]
    return min(candidate for candidate in candidates if candidate[0] == candidate[0])[2]


def test_quantization_rounds_to_the_nearest() -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    values, scales = per_token_quantize_fp8(x)
    for row, row_values, scale in zip(x, values.float(), scales.tolist(), strict=True):
        assert scale == pytest.approx(float(row.abs().max()) / 448.0, rel=1e-6)
        for number, rounded in zip(row.tolist(), row_values.tolist(), strict=True):
            exact = number / scale
            assert abs(rounded - exact) <= abs(nearest_fp8(exact) - exact) * (1 + 1e-5) + 1e-4


def test_quantization_of_no_rows_and_of_zeros() -> None:
    values, scales = per_token_quantize_fp8(torch.empty(0, 4))
    assert values.shape == (0, 4) and scales.shape == (0,)
    values, scales = per_token_quantize_fp8(torch.zeros(2, 4))
    assert not values.float().any()
    assert bool((scales > 0).all())


@pytest.mark.parametrize("num_rows", [0, 1, 2, 17])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_on_the_cpu(num_rows: int, with_bias: bool, dtype: torch.dtype) -> None:
    check_products(num_rows, (24, 40), with_bias, dtype, "cpu", 1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [0, 1, 2, 16, 17, 64, 65, 128, 129, 300, 512, 600])
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 14336), (1000, 4104), (28672, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_on_a_gpu(num_rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The tensor cores sum float8 products with about 14 bits, so long sums are a little less exact."""
    check_products(num_rows, shape, True, dtype, "cuda", 6e-3)


def check_products(
    num_rows: int, shape: tuple[int, int], with_bias: bool, dtype: torch.dtype, device: str, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, shape[1], generator=generator).to(device, dtype)
    weight = Fp8Weight.of(per_token_quantize_fp8(torch.randn(shape, generator=generator).to(device, dtype)))
    bias = torch.randn(shape[0], generator=generator).to(device, dtype) if with_bias else None
    exact_weight = weight.values.double() * weight.scales.double()[:, None]
    shift = 0.0 if bias is None else bias.double()
    actual = weight_only_linear(x, weight, bias)
    assert actual.dtype == dtype
    assert relative_error(actual, x.double() @ exact_weight.T + shift) <= tolerance
    rows = per_token_quantize_fp8(x)
    actual = scaled_linear(rows, weight, bias, dtype)
    assert actual.dtype == dtype
    exact_rows = rows.values.double() * rows.scales.double()[:, None]
    assert relative_error(actual, exact_rows @ exact_weight.T + shift) <= tolerance


def test_the_choice() -> None:
    assert choose(torch.device("cpu"), torch.bfloat16) == "reference"
    assert choose(torch.device("cuda"), torch.bfloat16) == "triton"
    assert choose(torch.device("cuda"), torch.float32) == "reference"
