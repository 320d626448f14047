"""What this CPU gives at the moment: bytes read from memory a second, 8-bit integer operations a second.

Both are measured with kernels of the engine's own kind on its thread pool, so that the limits are those that kernels
could reach: memory in huge pages read once from end to end, and dot products that stay in registers.
"""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from tokenmill.ops.cpu.cpu_features import DotProduct, best_dot_product
from tokenmill.ops.cpu.dot_product import Loop, Writer
from tokenmill.ops.cpu.intrinsics import argument, chunk_range, store_release
from tokenmill.ops.cpu.jit import NativeFunction, kernel
from tokenmill.ops.cpu.layout import FIRST_ARGUMENT
from tokenmill.ops.cpu.simd import I32, I32X16, I64, constant
from tokenmill.ops.cpu.threads import OpList, ThreadPool

READ_BYTES: Final = 256 * 2**20
BLOCK_BYTES: Final = 2**20
NUM_TURNS: Final = 1_000_000
NUM_ACCUMULATORS: Final = 12
OPS_PER_DOT: Final = 16 * 4 * 2
TRIES: Final = 7

BEST: Final = int(best_dot_product())


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


@intrinsic
def sum_vectors(context: Any, address: Any, num_vectors: Any) -> Any:
    """Read `num_vectors` times 256 bytes; gives a number that depends on all of them."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        writer = Writer(builder, DotProduct.PORTABLE)
        loop = Loop(builder, arguments[1], [arguments[0], *[constant(I32, 0)] * 4])
        place, *totals = loop.carried
        following = [builder.xor(total, writer.load(I32X16, place, 64 * index)) for index, total in enumerate(totals)]
        loop.close([builder.add(place, I64(256)), *following])
        return first_lane(builder, following)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def multiply_registers(context: Any, num_turns: Any) -> Any:
    """`num_turns` times `NUM_ACCUMULATORS` dot products, in registers; gives a number that depends on all of them."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        writer = Writer(builder, DotProduct(BEST))
        start = [constant(I32, index) for index in range(NUM_ACCUMULATORS)]
        loop = Loop(builder, arguments[0], [*start, constant(I32, 0x01020304), constant(I32, 0x04030201)])
        *totals, weights, values = loop.carried
        following = [writer.dot(total, weights, values) for total in totals]
        # The factors depend on what was computed, or LLVM would take the loop apart.
        bit = builder.and_(following[0], constant(I32, 1))
        loop.close([*following, builder.xor(weights, bit), values])
        return first_lane(builder, following)

    return types.int64(types.int64), codegen


def first_lane(builder: ir.IRBuilder, vectors: Sequence[ir.Value]) -> ir.Value:
    """A number made of all vectors."""
    total = vectors[0]
    for vector in vectors[1:]:
        total = builder.xor(total, vector)
    number = builder.extract_element(total, I32(0))
    for lane in range(1, 16):
        number = builder.xor(number, builder.extract_element(total, I32(lane)))
    return builder.zext(number, I64)


@kernel
def read_memory(thread: int, num_threads: int, row: int) -> None:
    """Read a thread's share of the blocks at an address; a result goes to a word of its own, never looked at."""
    memory, num_blocks = argument(row, FIRST_ARGUMENT), argument(row, FIRST_ARGUMENT + 1)
    results = argument(row, FIRST_ARGUMENT + 2)
    first, end = chunk_range(thread, num_threads, num_blocks)
    store_release(
        results + 64 * thread, sum_vectors(memory + first * BLOCK_BYTES, (end - first) * (BLOCK_BYTES // 256))
    )


@kernel
def multiply(thread: int, num_threads: int, row: int) -> None:
    """Dot products in registers, as many on each thread."""
    store_release(argument(row, FIRST_ARGUMENT + 1) + 64 * thread, multiply_registers(argument(row, FIRST_ARGUMENT)))


def measure_limits(num_threads: int) -> MachineLimits:
    """The best of several tries each, about a quarter of a second in all."""
    results = np.zeros(8 * num_threads, np.int64)
    memory = mmap.mmap(-1, READ_BYTES + 2**21)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(memory, np.uint8)
    data[:] = 1
    pool = ThreadPool(num_threads)
    try:
        read = steps(pool, read_memory, data.ctypes.data, READ_BYTES // BLOCK_BYTES, results.ctypes.data)
        compute = steps(pool, multiply, NUM_TURNS, results.ctypes.data)
        num_ops = num_threads * NUM_TURNS * NUM_ACCUMULATORS * OPS_PER_DOT
        return MachineLimits(bandwidth=READ_BYTES / best_time(read), int8_ops=num_ops / best_time(compute))
    finally:
        pool.close()
        del data


def steps(pool: ThreadPool, function: NativeFunction, *arguments: int) -> Callable[[], None]:
    """Runs one kernel on all threads."""
    ops = OpList(1)
    ops.append(function, *arguments)
    return lambda: pool.run(ops)


def best_time(function: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, after one that compiles."""
    function()
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    import os

    found = measure_limits(os.cpu_count() or 1)
    print(f"{found.bandwidth / 1e9:.1f} GB/s, {found.int8_ops / 1e9:.0f} Gop/s (8-bit)")
