from __future__ import annotations

import math

import pytest
import torch

from tokenmill.ops.argmax import IMPLEMENTATIONS, NUM_PARTS, argmax, choose

SIZE = 4 * NUM_PARTS


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_the_largest(name: str, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(7, SIZE, generator=torch.Generator().manual_seed(3)).round().to(dtype)  # many equal ones
    largest, index = IMPLEMENTATIONS[name](x.to(device))
    expected = [row.index(max(row)) for row in x.tolist()]
    assert index.tolist() == expected
    assert index.dtype == torch.int64
    assert largest.tolist() == [max(row) for row in x.tolist()]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_that_are_no_distribution_show(name: str, device: str) -> None:
    x = torch.zeros(3, SIZE, device=device)
    x[0, 77], x[1, 5] = math.nan, math.inf
    x[2] = -math.inf
    largest, index = IMPLEMENTATIONS[name](x)
    assert largest.isnan().tolist() == [True, False, False]
    assert largest[1:].isinf().all()
    assert index[:2].tolist() == [77, 5]


def test_slices_of_wider_rows(device: str) -> None:
    x = torch.arange(5 * 2 * SIZE, device=device).float().view(5, 2 * SIZE)[:, :SIZE]
    for find in IMPLEMENTATIONS.values():
        assert find(x)[1].tolist() == [SIZE - 1] * 5
    assert argmax(x[:0])[1].shape == (0,)


def test_parts_are_for_few_rows_on_a_gpu() -> None:
    assert choose(torch.zeros(1, SIZE)) == "torch"
