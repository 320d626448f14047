"""Kernels that measure what this machine allows: bytes read from memory, and int8 products. Used by benchmarks."""

from __future__ import annotations

from functools import cache
from typing import Final

from llvmlite import ir

from tokenmill.ops.cpu.cpu_features import DotProduct, best_dot_product
from tokenmill.ops.cpu.dot_product import DotSum, Loop, Writer
from tokenmill.ops.cpu.intrinsics import argument, chunk_range
from tokenmill.ops.cpu.jit import NativeFunction, kernel
from tokenmill.ops.cpu.layout import FIRST_ARGUMENT
from tokenmill.ops.cpu.native_types import int64, literal, none
from tokenmill.ops.cpu.simd import I32X16, I64, operation

SOURCE: Final = FIRST_ARGUMENT  # address of the memory to read; for `product_kernel` of 64 bytes
NUM_BYTES: Final = FIRST_ARGUMENT + 1  # to read: a multiple of 4096
RESULT: Final = FIRST_ARGUMENT + 2  # address of 4096 bytes for each thread
NUM_TURNS: Final = FIRST_ARGUMENT + 3  # of `product_kernel`

STREAM_BYTES: Final = 1024
PAGE: Final = 4096
ACCUMULATORS: Final = 16
OPERATIONS_PER_TURN: Final = ACCUMULATORS * 16 * 4 * 2
"""Multiplications and additions of a thread in a turn."""


@operation(none, int64, int64, int64)
def read_stream(builder: ir.IRBuilder, address: ir.Value, num_turns: ir.Value, result: ir.Value) -> None:
    """Read `num_turns` times 1,024 bytes; their exclusive or goes to `result`, so that nothing can be left out."""
    writer = Writer(builder, DotProduct.PORTABLE)
    zero = ir.Constant(I32X16, [0] * 16)
    loop = Loop(builder, num_turns, [address, *[zero] * 4])
    place, *totals = loop.carried
    for index in range(STREAM_BYTES // 64):
        totals[index % 4] = builder.xor(totals[index % 4], writer.load(I32X16, place, 64 * index))
    loop.close([builder.add(place, I64(STREAM_BYTES)), *totals])
    for index, total in enumerate(totals):
        writer.store(total, result, 64 * index)


@operation(none, literal, int64, int64, int64)
def multiply_turns(builder: ir.IRBuilder, way: int, source: ir.Value, num_turns: ir.Value, result: ir.Value) -> None:
    """Dot products of the 64 bytes at `source` with themselves, on 16 accumulators that wait for nothing else."""
    writer = Writer(builder, DotProduct(way))
    vector = writer.load(I32X16, source)
    loop = Loop(builder, num_turns, [vector] * ACCUMULATORS)
    totals = []
    for carried in loop.carried:
        total = DotSum(writer, 8, carried)
        total.add(vector, vector)
        totals.append(total.result())
    loop.close(totals)
    for index, total in enumerate(totals):
        writer.store(total, result, 64 * index)


@kernel
def read_memory(thread: int, num_threads: int, row: int) -> None:
    """Each thread reads its part of the memory once."""
    first, end = chunk_range(thread, num_threads, argument(row, NUM_BYTES) // PAGE)
    place = argument(row, SOURCE) + first * PAGE
    read_stream(place, (end - first) * (PAGE // STREAM_BYTES), argument(row, RESULT) + thread * PAGE)


@cache
def product_kernel(way: DotProduct | None = None) -> NativeFunction:
    """The kernel that does nothing but dot products, `OPERATIONS_PER_TURN` a turn and thread."""
    method = int(best_dot_product() if way is None else way)

    def products(thread: int, num_threads: int, row: int) -> None:
        multiply_turns(method, argument(row, SOURCE), argument(row, NUM_TURNS), argument(row, RESULT) + thread * PAGE)

    return NativeFunction(products)
