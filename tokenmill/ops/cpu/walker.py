"""Native code of the step: every thread walks the op list, with a barrier after each op. Called by `threads.py`.

The threads share a control block of int64, at most one writer's words in a cache line.
"""

from __future__ import annotations

from typing import Final

from tokenmill.ops.cpu.intrinsics import (
    argument,
    call_kernel,
    cycle_count,
    fetch_add,
    flush_denormals,
    load_acquire,
    pause,
    restore_rounding,
    sleep_while_equal,
    store_release,
    wake_sleepers,
    yield_core,
)
from tokenmill.ops.cpu.jit import NativeFunction, device
from tokenmill.ops.cpu.layout import COLUMN_BARRIER, COLUMN_KERNEL, ROW_SIZE
from tokenmill.ops.cpu.native_types import int64, none

CONTROL_SIZE: Final = 64
"""int64 in the control block."""

# Byte offsets in the control block.
STEP_NUMBER: Final = 0  # the leader counts steps here; workers wait for it to change
BARRIER_COUNT: Final = 64  # threads that have arrived
BARRIER_PHASE: Final = 128  # counts barriers that are passed
NUM_SLEEPERS: Final = 192
STOP: Final = 256  # workers end at the next step
OPS: Final = 320  # address of the op list, written by the leader before a step
NUM_OPS: Final = 328
TIMES: Final = 336  # address of NUM_OPS + 1 int64 for clock readings, or 0

SPINS_BEFORE_YIELD: Final = 200
"""Looks, of about 40 ns each, between two offers of the core to others. A barrier is passed after some hundred
nanoseconds, unless the thread that is waited for has no core; on a busy machine it may wait for this very one."""

ROW_BYTES: Final = 8 * ROW_SIZE


@device
def barrier(control: int, num_threads: int) -> None:
    """Wait for all threads."""
    if num_threads == 1:
        return
    phase = load_acquire(control + BARRIER_PHASE)
    if fetch_add(control + BARRIER_COUNT, 1) == num_threads - 1:
        store_release(control + BARRIER_COUNT, 0)
        store_release(control + BARRIER_PHASE, phase + 1)
        return
    spins = 0
    while load_acquire(control + BARRIER_PHASE) == phase:
        pause()
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            yield_core()


@device
def walk(control: int, thread: int, num_threads: int) -> None:
    """Do one thread's part of all ops."""
    row = load_acquire(control + OPS)
    num_ops = load_acquire(control + NUM_OPS)
    is_timed = load_acquire(control + TIMES)
    times = is_timed if thread == 0 else 0
    for index in range(num_ops):
        if times != 0:
            store_release(times + 8 * index, cycle_count())
        call_kernel(argument(row, COLUMN_KERNEL), thread, num_threads, row)
        # A timed op is over when all threads are: else the leader's time for the next one would hold the wait for it.
        if argument(row, COLUMN_BARRIER) | is_timed != 0:
            barrier(control, num_threads)
        row += ROW_BYTES
    barrier(control, num_threads)
    if times != 0:
        store_release(times + 8 * num_ops, cycle_count())


@device
def lead_walk(control: int, num_threads: int) -> None:
    """Start the step in the control block, do thread 0's part, return when all is done."""
    if num_threads > 1:
        fetch_add(control + STEP_NUMBER, 1)
        if load_acquire(control + NUM_SLEEPERS) > 0:
            wake_sleepers(control + STEP_NUMBER)
    walk(control, 0, num_threads)


def _lead(control: int, num_threads: int) -> None:
    rounding = flush_denormals()
    lead_walk(control, num_threads)
    restore_rounding(rounding)


def _work(control: int, thread: int, num_threads: int, num_spins: int) -> None:
    flush_denormals()
    step = 0
    while True:
        spins = 0
        while load_acquire(control + STEP_NUMBER) == step:
            pause()
            spins += 1
            if spins % SPINS_BEFORE_YIELD == 0:
                yield_core()
            if spins > num_spins:
                fetch_add(control + NUM_SLEEPERS, 1)
                sleep_while_equal(control + STEP_NUMBER, step)
                fetch_add(control + NUM_SLEEPERS, -1)
        step += 1
        if load_acquire(control + STOP) != 0:
            return
        walk(control, thread, num_threads)


lead_step: Final = NativeFunction(_lead, none(int64, int64))
"""(control, num_threads): `lead_walk`."""

work: Final = NativeFunction(_work, none(int64, int64, int64, int64))
"""(control, thread, num_threads, num_spins): a worker's life. It looks `num_spins` times for a step, then sleeps."""


def _release(control: int) -> None:
    fetch_add(control + STEP_NUMBER, 1)
    wake_sleepers(control + STEP_NUMBER)


release_workers: Final = NativeFunction(_release, none(int64))
"""(control): let the workers look at STOP."""
