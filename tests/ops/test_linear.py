from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tokenmill.ops.linear import (
    PackedWeight,
    StreamedWeight,
    add_product,
    adds_product,
    choose,
    linear,
    linear_reference,
    new_arrivals,
    pack_linear_weight,
    padded_num_rows,
)

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def inputs(num_rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, 48, generator=generator).to(dtype)
    weight = (torch.randn(80, 48, generator=generator) * 0.2).to(dtype)
    return x, weight, torch.randn(80, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 16, 65])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_plain_and_reference_agree(dtype: torch.dtype, num_rows: int, with_bias: bool) -> None:
    x, weight, bias = inputs(num_rows, dtype)
    used_bias = bias if with_bias else None
    expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0.0)
    for actual in (
        linear(x, pack_linear_weight(weight), used_bias),
        linear(x, weight, used_bias),
        linear_reference(x, weight, used_bias),
    ):
        assert actual.dtype == dtype
        assert actual.shape == (num_rows, 80)
        torch.testing.assert_close(actual.double(), expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("num_rows", [0, 65, 300])
def test_a_product_that_is_added(num_rows: int, device: str) -> None:
    x, matrix, _ = (tensor.to(device) for tensor in inputs(num_rows, torch.bfloat16))
    weight = StreamedWeight(matrix, new_arrivals(matrix))
    assert adds_product(num_rows, weight)
    stream = torch.randn(num_rows, 80, device=device).bfloat16()
    expected = stream.double() + x.double() @ matrix.double().T
    add_product(stream, x, weight)
    torch.testing.assert_close(stream.double(), expected, atol=2e-2, rtol=2e-2)


def test_where_products_are_added() -> None:
    """Not where our own kernels multiply, and not where each row must have the same bits in any company."""
    weight = StreamedWeight(torch.zeros(80, 48, dtype=torch.bfloat16), torch.zeros(1))
    assert [adds_product(num_rows, weight) for num_rows in (1, 2, 64, 65)] == [False, False, False, True]
    assert not adds_product(65, replace(weight, batch_invariant=True))


def test_a_row_of_a_wider_tensor() -> None:
    """Inputs need not be contiguous."""
    x, weight, _ = inputs(8, torch.float32)
    wide = torch.cat((x, x + 1), dim=1)
    torch.testing.assert_close(linear(wide[::2, 48:], pack_linear_weight(weight)), (x[::2] + 1) @ weight.T)


def test_packing_copies() -> None:
    """The packed weight does not follow later changes of the plain one."""
    x, weight, _ = inputs(4, torch.float32)
    packed = pack_linear_weight(weight)
    expected = x @ weight.T
    if isinstance(packed, PackedWeight):
        assert (packed.out_features, packed.in_features) == (80, 48)
        weight.zero_()
    torch.testing.assert_close(linear(x, packed), expected)


def test_only_types_with_a_packed_product_are_packed() -> None:
    weight = torch.randn(4, 4)
    assert choose(CPU, torch.float16) == "torch"
    assert choose(torch.device("cuda"), torch.float32) == "torch"
    half = weight.half()
    assert pack_linear_weight(half) is half
    assert isinstance(pack_linear_weight(weight), PackedWeight) == (choose(CPU, torch.float32) == "onednn")


def test_products_are_computed_with_few_numbers_of_rows() -> None:
    """oneDNN keeps a kernel for each, so that a server's memory grows with their number."""
    padded = [padded_num_rows(num_rows) for num_rows in range(1, 2049)]
    assert all(num_rows <= more <= num_rows * 1.125 for num_rows, more in enumerate(padded, start=1))
    assert padded[:16] == list(range(1, 17)), "small batches are not padded"
    assert padded == sorted(padded)
    assert len(set(padded)) < 80


def test_padding_changes_no_row() -> None:
    x, weight, bias = inputs(100, torch.bfloat16)
    packed = pack_linear_weight(weight)
    assert padded_num_rows(97) == 104
    product = linear(x[:97], packed, bias)
    assert product.shape == (97, 80)
    torch.testing.assert_close(product, linear(x, packed, bias)[:97], atol=2e-2, rtol=2e-2)
