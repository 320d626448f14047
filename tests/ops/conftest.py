"""Tests of this folder compute with one thread; without a GPU, Triton kernels run in its interpreter, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.support.single_thread import single_thread
from tests.support.triton_kernels import poisoned_empty

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, on import


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel's test runs: in the interpreter where there is no GPU, and compiled on a GPU."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled for the GPU in this process")
    return str(request.param)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors are full of NaN."""
    monkeypatch.setattr(torch, "empty", poisoned_empty)
