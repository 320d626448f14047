"""Functions of vectors against float64, in units in the last place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tokenmill.ops.cpu import vector_math
from tokenmill.ops.cpu.jit import NativeFunction
from tokenmill.ops.cpu.native_types import int64, none
from tokenmill.ops.cpu.simd import load, store


def applied(function: Any, x: torch.Tensor) -> torch.Tensor:
    """The function of every value."""

    def loop(source: int, target: int, count: int) -> None:
        for offset in range(0, 4 * count, 64):
            store(target + offset, function(load(source + offset)))

    y = torch.empty_like(x)
    NativeFunction(loop, none(int64, int64, int64)).call(x.data_ptr(), y.data_ptr(), x.numel())
    return y


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("name", "exact", "low", "high", "max_ulp"),
    [
        ("exp2_negative", torch.exp2, -124.0, 0.0, 2),
        ("exp", torch.exp, -86.0, 88.0, 2),
        ("tanh", torch.tanh, -10.0, 10.0, 6),
        ("silu", lambda x: x * torch.sigmoid(x), -80.0, 80.0, 3),
        ("gelu_tanh", gelu, -2.0, 6.0, 6),
    ],
)
def test_errors_are_as_documented(
    name: str, exact: Callable[[torch.Tensor], torch.Tensor], low: float, high: float, max_ulp: int
) -> None:
    x = torch.linspace(low, high, 1 << 16)
    expected = exact(x.double())
    single = expected.float().abs()
    ulp = (torch.nextafter(single, torch.tensor(torch.inf)) - single).double()
    assert ((applied(getattr(vector_math, name), x).double() - expected).abs() / ulp).max() <= max_ulp


@pytest.mark.parametrize("name", ["sine", "cosine"])
def test_large_angles(name: str) -> None:
    x = torch.cat([torch.linspace(-10, 10, 1 << 12), torch.linspace(0, 2e6, 1 << 12)])
    expected = {"sine": torch.sin, "cosine": torch.cos}[name](x.double())
    assert (applied(getattr(vector_math, name), x).double() - expected).abs().max() < 1.5e-7


def test_special_values() -> None:
    x = torch.tensor([-torch.inf, -1e30, -200.0, 0.0] * 4)
    assert applied(vector_math.exp2_negative, x)[:4].tolist() == [2.0**-125] * 3 + [1.0]
    assert applied(vector_math.tanh, torch.tensor([50.0, -50.0, 0.0, torch.nan] * 4))[:3].tolist() == [1.0, -1.0, 0.0]
    assert applied(vector_math.exp2_negative, torch.full((16,), torch.nan)).isnan().all()
    assert applied(vector_math.exp, torch.full((16,), torch.nan)).isnan().all()


def test_transposition() -> None:
    x = torch.arange(16 * 20, dtype=torch.float32).view(16, 20)
    y = torch.zeros(16, 17)

    def transpose(source: int, target: int) -> None:
        vector_math.transpose_16x16(source, 80, target, 68)

    NativeFunction(transpose, none(int64, int64)).call(x.data_ptr(), y.data_ptr())
    assert torch.equal(y[:, :16], x[:, :16].T)
    assert not y[:, 16].any()
