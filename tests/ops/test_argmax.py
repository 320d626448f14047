"""The most likely tokens: of every implementation, on the CPU, in triton's interpreter and on a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from tokenmill.ops.argmax import IMPLEMENTATIONS, TokenPlaces, choose, most_likely

SIZES = [1, 7, 300, pytest.param(5000, id="several blocks"), pytest.param(128256, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_the_first_of_the_largest(name: str, dtype: torch.dtype, size: int, device: str) -> None:
    x = torch.randn(7, size, generator=torch.Generator().manual_seed(3)).round().to(dtype)  # many equal ones
    token_ids, invalid = IMPLEMENTATIONS[name](x.to(device), None)
    assert token_ids.tolist() == [row.index(max(row)) for row in x.tolist()]
    assert token_ids.dtype == torch.int64 and invalid.dtype == torch.bool
    assert not invalid.any()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_that_are_no_distribution_are_invalid(name: str, device: str) -> None:
    x = torch.zeros(4, 128, device=device)
    x[0, 77], x[1, 5] = math.nan, math.inf
    x[2] = -math.inf
    x[3, 9], x[3, 11] = 3e38, -math.inf
    token_ids, invalid = IMPLEMENTATIONS[name](x, None)
    assert invalid.tolist() == [True, True, True, False]
    assert token_ids.tolist() == [0, 0, 0, 9]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_tokens_go_to_their_places(name: str, device: str) -> None:
    table = torch.full((4, 9), -1, dtype=torch.int64, device=device)
    x = torch.zeros(3, 50, device=device)
    x[0, 4], x[1, 49], x[2, 0] = 1.0, 2.0, math.nan
    places = TokenPlaces(table[:, :8], *torch.tensor([[2, 0, 3], [7, 0, 5]], device=device))
    IMPLEMENTATIONS[name](x, places)
    expected = torch.full((4, 9), -1, dtype=torch.int64)
    expected[2, 7], expected[0, 0], expected[3, 5] = 4, 49, 0
    assert torch.equal(table.cpu(), expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_slices_of_wider_rows_and_no_rows(name: str, device: str) -> None:
    x = torch.arange(5 * 256, device=device).float().view(5, 256)
    assert IMPLEMENTATIONS[name](x[:, :128], None)[0].tolist() == [127] * 5
    assert IMPLEMENTATIONS[name](x[:, ::2], None)[0].tolist() == [127] * 5
    assert most_likely(x[:0])[0].shape == (0,)


def test_many_rows_share_the_device_in_larger_parts(device: str) -> None:
    x = torch.zeros(600, 5000, device=device)
    x[torch.arange(600), torch.arange(600) * 8] = 1.0
    assert IMPLEMENTATIONS["triton"](x[:: 1 if device == "cuda" else 100], None)[0].tolist() == list(
        range(0, 4800, 8 if device == "cuda" else 800)
    )


def test_who_chooses_on_a_cpu() -> None:
    assert choose(torch.device("cpu")) == "torch"
