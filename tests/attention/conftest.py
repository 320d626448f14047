"""One thread; and without a GPU, Triton kernels run in its interpreter: on the CPU, slowly, so with tiny shapes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.support.single_thread import single_thread

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, on import


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel's test runs: in the interpreter on the CPU, and on a GPU. A machine with a GPU runs the second."""
    if request.param == "cpu" and "TRITON_INTERPRET" not in os.environ:
        pytest.skip("kernels are compiled for the GPU in this process")
    return str(request.param)
