"""Memory for weights, and the kernels that measure the machine."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.packed_linear import aligned, run_kernel
from tokenmill.ops.cpu.cpu_features import DotProduct, supported_dot_products
from tokenmill.ops.cpu.limits import PAGE, product_kernel, read_memory
from tokenmill.ops.cpu.memory import HUGE_PAGE, huge_page_memory


@pytest.mark.parametrize("num_bytes", [1, HUGE_PAGE, HUGE_PAGE + 1])
def test_memory_is_aligned_and_zero(num_bytes: int) -> None:
    memory = huge_page_memory(num_bytes)
    assert memory.shape == (num_bytes,)
    assert memory.ctypes.data % HUGE_PAGE == 0
    assert not memory.any()
    memory[:] = 7
    view = memory[:1]
    del memory
    assert view[0] == 7  # a view keeps the memory


@pytest.mark.parametrize("num_threads", [1, 2])
def test_all_memory_is_read(num_threads: int) -> None:
    source = huge_page_memory(8 * PAGE)
    source[:] = np.random.default_rng(0).integers(0, 256, len(source), dtype=np.uint8)
    result = aligned(PAGE * num_threads)
    run_kernel(read_memory, (source.ctypes.data, len(source), result.ctypes.data), 0, num_threads)
    found = np.bitwise_xor.reduce(result.reshape(num_threads, -1)[:, :256].reshape(-1, 64), axis=0)
    assert np.array_equal(found, np.bitwise_xor.reduce(source.reshape(-1, 64), axis=0))


@pytest.mark.parametrize("way", supported_dot_products())
def test_all_products_are_computed(way: DotProduct) -> None:
    source, result = aligned(64), aligned(PAGE)
    source[:] = 2
    run_kernel(product_kernel(way), (source.ctypes.data, 0, result.ctypes.data, 5), 0)
    totals = result.view(np.int32)[:256]
    assert (totals == 0x02020202 + 5 * 4 * 4).all()
