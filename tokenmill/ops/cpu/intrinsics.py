"""What kernels and the walker need beyond vectors: op arguments, work division, atomics, sleep, clock, rounding mode.

Addresses are int64. `simd.py` has the vector operations.
"""

from __future__ import annotations

import platform
import sys
from typing import Any, Final

from llvmlite import ir

from tokenmill.ops.cpu.jit import device
from tokenmill.ops.cpu.layout import panel_width
from tokenmill.ops.cpu.native_types import float32, int64, none
from tokenmill.ops.cpu.simd import I32, I64, call, declare, operation

I8: Final = ir.IntType(8)
F64: Final = ir.DoubleType()
IS_X86: Final = platform.machine().lower() in ("x86_64", "amd64")

FLUSH_DENORMALS: Final = 0x8040
"""Bits of MXCSR: results and inputs that are denormal count as zero."""

FUTEX_WAIT_PRIVATE: Final = 128
FUTEX_WAKE_PRIVATE: Final = 129
SYSTEM_CALL_FUTEX: Final = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), -1)
HAS_FUTEX: Final = sys.platform == "linux" and SYSTEM_CALL_FUTEX >= 0

device_panel_width: Final = device(panel_width)


def pointer(builder: ir.IRBuilder, address: ir.Value, element: ir.Type) -> ir.Value:
    """The address as a pointer."""
    return builder.inttoptr(address, element.as_pointer())


# Arguments of an op.


@operation(int64, int64, int64)
def argument(builder: ir.IRBuilder, row: ir.Value, column: ir.Value) -> ir.Value:
    """The int64 in a column of an op row."""
    return builder.load(pointer(builder, builder.add(row, builder.shl(column, I64(3))), I64), align=8)


@operation(float32, int64, int64)
def float_argument(builder: ir.IRBuilder, row: ir.Value, column: ir.Value) -> ir.Value:
    """The number in a column that holds the bits of a float64."""
    value = builder.load(pointer(builder, builder.add(row, builder.shl(column, I64(3))), F64), align=8)
    return builder.fptrunc(value, ir.FloatType())


@device
def first_chunk(thread: int, num_threads: int, num_chunks: int) -> int:
    """First of the chunks of a thread; `first_chunk(thread + 1, ...)` is the end."""
    return thread * num_chunks // num_threads


@device
def chunk_range(thread: int, num_threads: int, num_chunks: int) -> tuple[int, int]:
    """First and end of the contiguous chunks that belong to a thread."""
    return thread * num_chunks // num_threads, (thread + 1) * num_chunks // num_threads


# Threads.


@operation(int64, int64)
def load_acquire(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The int64 at an address that other threads write."""
    return builder.load_atomic(pointer(builder, address, I64), "acquire", 8)


@operation(none, int64, int64)
def store_release(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Write an int64 after everything that was written before."""
    builder.store_atomic(value, pointer(builder, address, I64), "seq_cst", 8)


@operation(int64, int64, int64)
def fetch_add(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
    """Add to the int64 at an address; its value before."""
    return builder.atomic_rmw("add", pointer(builder, address, I64), value, "seq_cst")


@operation(none)
def pause(builder: ir.IRBuilder) -> None:
    """Tell the core that this thread spins."""
    if IS_X86:
        builder.call(declare(builder, "llvm.x86.sse2.pause", ir.VoidType(), []), [])


@operation(none)
def yield_core(builder: ir.IRBuilder) -> None:
    """Let other threads have the core."""
    builder.call(declare(builder, "sched_yield", I32, []), [])


@operation(none, int64, int64)
def sleep_while_equal(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Sleep until `wake_sleepers`, unless the low 32 bits at an address differ from `value`. May return early."""
    if HAS_FUTEX:
        futex(builder, address, FUTEX_WAIT_PRIVATE, value)
    else:
        builder.call(declare(builder, "usleep", I32, [I32]), [I32(50)])


@operation(none, int64)
def wake_sleepers(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Wake all threads that sleep on an address."""
    if HAS_FUTEX:
        futex(builder, address, FUTEX_WAKE_PRIVATE, I64(0x7FFFFFFF))


def futex(builder: ir.IRBuilder, address: ir.Value, action: int, value: ir.Value) -> None:
    """Linux's system call, through the C library."""
    function = declare(builder, "syscall", I64, [I64] * 5)
    builder.call(function, [I64(SYSTEM_CALL_FUTEX), address, I64(action), value, I64(0)])


@operation(int64)
def cycle_count(builder: ir.IRBuilder) -> ir.Value:
    """A counter that runs at a constant rate."""
    return call(builder, "llvm.readcyclecounter", I64)


@operation(int64)
def flush_denormals(builder: ir.IRBuilder) -> ir.Value:
    """Denormals are zero in this thread from now on; gives the state before, for `restore_rounding`."""
    if not IS_X86:
        return I64(0)
    state = builder.alloca(I32)
    mxcsr(builder, "stmxcsr", state)
    before = builder.load(state)
    builder.store(builder.or_(before, I32(FLUSH_DENORMALS)), state)
    mxcsr(builder, "ldmxcsr", state)
    return builder.zext(before, I64)


@operation(none, int64)
def restore_rounding(builder: ir.IRBuilder, before: ir.Value) -> None:
    """Undo `flush_denormals`."""
    if IS_X86:
        state = builder.alloca(I32)
        builder.store(builder.trunc(before, I32), state)
        mxcsr(builder, "ldmxcsr", state)


def mxcsr(builder: ir.IRBuilder, action: str, state: ir.Value) -> None:
    """Store or load the control register."""
    function = declare(builder, f"llvm.x86.sse.{action}", ir.VoidType(), [I8.as_pointer()])
    builder.call(function, [builder.bitcast(state, I8.as_pointer())])


@operation(none, int64, int64, int64, int64)
def call_kernel(builder: ir.IRBuilder, address: ir.Value, thread: ir.Value, num_threads: ir.Value, row: Any) -> None:
    """Call a kernel by address."""
    signature = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
    builder.call(pointer(builder, address, signature), [thread, num_threads, row])
