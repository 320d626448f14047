"""What this CPU gives at the moment: bytes read from memory a second, 8-bit integer operations a second.

Measured with kernels of the engine's own kind on its thread pool (`ops/cpu/limits.py`), so that the limits are those
that its kernels could reach: memory in huge pages read once from end to end, dot products that stay in registers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tokenmill.ops.cpu.limits import OPERATIONS_PER_TURN, PAGE, product_kernel, read_memory
from tokenmill.ops.cpu.memory import huge_page_memory
from tokenmill.ops.cpu.threads import OpList, ThreadPool

READ_BYTES: Final = 256 * 2**20
NUM_TURNS: Final = 200_000
TRIES: Final = 7


@dataclass(frozen=True)
class MachineLimits:
    """What this machine can do at best.

    Args:
        bandwidth: bytes a second that all threads together read from memory.
        int8_ops: multiplications and additions of 8-bit integers a second.
    """

    bandwidth: float
    int8_ops: float

    @staticmethod
    def median(limits: Sequence[MachineLimits]) -> MachineLimits:
        """Of several measurements."""
        return MachineLimits(
            statistics.median(one.bandwidth for one in limits), statistics.median(one.int8_ops for one in limits)
        )


def measure_limits(num_threads: int) -> MachineLimits:
    """The best of several tries each, about a quarter of a second in all."""
    memory = huge_page_memory(READ_BYTES)
    memory[:] = 1
    results = huge_page_memory(PAGE * num_threads)
    read, multiply = OpList(1), OpList(1)
    read.append(read_memory, memory.ctypes.data, READ_BYTES, results.ctypes.data)
    multiply.append(product_kernel(), memory.ctypes.data, 0, results.ctypes.data, NUM_TURNS)
    pool = ThreadPool(num_threads)
    try:
        return MachineLimits(
            bandwidth=READ_BYTES / best_time(pool, read),
            int8_ops=num_threads * NUM_TURNS * OPERATIONS_PER_TURN / best_time(pool, multiply),
        )
    finally:
        pool.close()


def best_time(pool: ThreadPool, ops: OpList) -> float:
    """Seconds of the fastest of some runs, after one that compiles."""
    pool.run(ops)
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        pool.run(ops)
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    import os

    found = measure_limits(os.cpu_count() or 1)
    print(f"{found.bandwidth / 1e9:.1f} GB/s, {found.int8_ops / 1e9:.0f} Gop/s (8-bit)")
