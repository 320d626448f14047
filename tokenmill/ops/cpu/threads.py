"""`OpList`, a step as rows for the native walker, and `ThreadPool`, which runs it. Called by `runtime/`'s CPU executor.

The caller's thread is thread 0. The others are Python threads that spend their lives in native code without the
interpreter lock: they spin for the next step for a while, then sleep in the kernel until one comes.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from tokenmill.errors import InvalidParameterError
from tokenmill.ops.cpu import walker
from tokenmill.ops.cpu.jit import NativeFunction
from tokenmill.ops.cpu.layout import COLUMN_BARRIER, COLUMN_KERNEL, COLUMN_NUM_TOKENS, FIRST_ARGUMENT, ROW_SIZE
from tokenmill.ops.cpu.repetition import Repetition, lead_steps

NUM_SPINS: Final = 20_000
"""Looks for a step before a worker sleeps: about half a millisecond, longer than the host's work between two steps."""

CACHE_LINE: Final = 64

STEP_FUNCTIONS: Final = (walker.lead_step, lead_steps, walker.work, walker.release_workers)
"""What a pool calls besides kernels."""

END_SECONDS: Final = 1.0
"""How long a pool that ends waits for a step that is under way. Longer ones end with the process."""


class OpList:
    """The ops of a step. Rows are written once; a step changes only the numbers of tokens.

    Args:
        capacity: most ops that will be appended.
    """

    def __init__(self, capacity: int) -> None:
        self.rows: npt.NDArray[np.int64] = np.zeros((capacity, ROW_SIZE), np.int64)
        self.address = self.rows.ctypes.data
        self.num_ops = 0
        self._kernels: list[NativeFunction] = []  # keeps the machine code alive

    def append(self, kernel: NativeFunction, *arguments: int, num_tokens: int = 0, barrier: bool = True) -> int:
        """Add an op; its index.

        Args:
            kernel: what computes it.
            arguments: for the columns from `FIRST_ARGUMENT` on; floats as `float_bits(value)`.
            num_tokens: may be changed later in `rows[index, COLUMN_NUM_TOKENS]`.
            barrier: the next op reads or overwrites something that this one writes or reads.
        """
        assert self.num_ops < len(self.rows), "the op list is full"
        assert len(arguments) <= ROW_SIZE - FIRST_ARGUMENT, "too many arguments for a row"
        row = self.rows[self.num_ops]
        row[COLUMN_KERNEL] = kernel.address
        row[COLUMN_NUM_TOKENS] = num_tokens
        row[COLUMN_BARRIER] = barrier
        row[FIRST_ARGUMENT : FIRST_ARGUMENT + len(arguments)] = arguments
        self._kernels.append(kernel)
        self.num_ops += 1
        return self.num_ops - 1


class ThreadPool:
    """Threads for steps. One step at a time; `run` may be called from any thread.

    Args:
        num_threads: with the caller's; one for each core that may be used.
        num_spins: looks for the next step before a worker sleeps.

    Raises:
        InvalidParameterError: `num_threads` is less than 1.
    """

    def __init__(self, num_threads: int, *, num_spins: int = NUM_SPINS) -> None:
        if num_threads < 1:
            raise InvalidParameterError(f"num_threads is {num_threads}.", field="num_threads", remedy="Give 1 or more.")
        self.num_threads = num_threads
        self._num_spins = num_spins
        self._lock = threading.RLock()
        self._lead = walker.lead_step.call
        self._lead_steps = lead_steps.call
        self._start()

    def run(self, ops: OpList) -> None:
        """Run all ops; returns when the last thread has done its part."""
        with self._lock:
            self._set(ops, 0)
            self._lead(self._control, self.num_threads)

    def run_steps(self, ops: OpList, repetition: Repetition) -> int:
        """Run all ops once, and again as far as `repetition` says; how often they ran. See `repetition.lead_steps`."""
        with self._lock:
            self._set(ops, 0)
            num_steps: int = self._lead_steps(self._control, self.num_threads, repetition.address)
        return num_steps

    def run_timed(self, ops: OpList) -> npt.NDArray[np.float64]:
        """Run all ops; the nanoseconds that each took, with the barrier after it, [num_ops]."""
        ticks = np.zeros(ops.num_ops + 1, np.int64)
        with self._lock:
            self._set(ops, ticks.ctypes.data)
            begin = time.perf_counter_ns()
            self._lead(self._control, self.num_threads)
            elapsed = time.perf_counter_ns() - begin
        spent = np.diff(ticks).astype(np.float64)
        nanoseconds: npt.NDArray[np.float64] = spent * (elapsed / max(spent.sum(), 1.0))
        return nanoseconds

    def close(self) -> None:
        """End the threads, after the step that is under way. A pool that is closed cannot run."""
        with self._lock:
            self._close()

    def _set(self, ops: OpList, times: int) -> None:
        """Say what is run next; the lock is held."""
        if self._process != os.getpid():
            self._start()  # threads do not survive a fork
        assert self._close.alive, "the pool is closed"
        words = self._words
        words[walker.OPS // 8] = ops.address
        words[walker.NUM_OPS // 8] = ops.num_ops
        words[walker.TIMES // 8] = times

    def _start(self) -> None:
        memory = np.zeros(walker.CONTROL_SIZE + CACHE_LINE // 8, np.int64)
        skip = -memory.ctypes.data % CACHE_LINE // 8
        self._words = memory[skip : skip + walker.CONTROL_SIZE]
        self._control = self._words.ctypes.data
        self._process = os.getpid()
        # What workers do, and what ends them, is compiled now: later the compiler may be at work on another thread.
        work, release = walker.work.call, walker.release_workers.call
        threads = [
            threading.Thread(
                target=_work,
                args=(work, self._words, thread, self.num_threads, self._num_spins),
                name=f"tokenmill-cpu-{thread}",
                daemon=True,
            )
            for thread in range(1, self.num_threads)
        ]
        for thread in threads:
            thread.start()
        self._close = weakref.finalize(self, _stop, self._words, threads, self._lock, release, os.getpid())


def _work(
    work: Callable[[int, int, int, int], None],
    words: npt.NDArray[np.int64],
    thread: int,
    num_threads: int,
    num_spins: int,
) -> None:
    """A worker's life; it keeps the control block alive as long as it may look at it."""
    work(words.ctypes.data, thread, num_threads, num_spins)


def _stop(
    words: npt.NDArray[np.int64],
    threads: list[threading.Thread],
    lock: threading.RLock,
    release: Callable[[int], None],
    process: int,
) -> None:
    """End workers between two steps: at exit, when their pool is closed, or when nothing refers to it any more.

    Within a step some would leave and the others wait for them at its next barrier.
    """
    if process != os.getpid() or not lock.acquire(timeout=END_SECONDS):
        return
    words[walker.STOP // 8] = 1
    release(words.ctypes.data)
    for thread in threads:
        thread.join()
    lock.release()
