"""The pool that walks op lists: order, barriers, sleep, timing, forks, and its end."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tokenmill.errors import InvalidParameterError
from tokenmill.ops.cpu.intrinsics import argument, chunk_range, fetch_add, float_argument
from tokenmill.ops.cpu.jit import float_bits, kernel
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS, FIRST_ARGUMENT, ROW_SIZE
from tokenmill.ops.cpu.scalars import load_i64, store_i64
from tokenmill.ops.cpu.simd import load_f32, store_f32
from tokenmill.ops.cpu.threads import OpList, ThreadPool

COUNT = 37


@kernel
def shift(thread: int, num_threads: int, row: int) -> None:
    """target[i] = source[COUNT - 1 - i] + 1: each thread reads what others wrote."""
    source, target = argument(row, FIRST_ARGUMENT), argument(row, FIRST_ARGUMENT + 1)
    first, end = chunk_range(thread, num_threads, COUNT)
    for index in range(first, end):
        store_i64(target + 8 * index, load_i64(source + 8 * (COUNT - 1 - index)) + 1)


@kernel
def count_threads(thread: int, num_threads: int, row: int) -> None:
    fetch_add(argument(row, FIRST_ARGUMENT) + 8 * thread, argument(row, COLUMN_NUM_TOKENS))


@kernel
def scale(thread: int, num_threads: int, row: int) -> None:
    if thread == num_threads - 1:
        place = argument(row, FIRST_ARGUMENT)
        store_f32(place, load_f32(place) * float_argument(row, FIRST_ARGUMENT + 1))


@kernel
def write_late(thread: int, num_threads: int, row: int) -> None:
    if thread == num_threads - 1:
        for _ in range(200_000):
            fetch_add(argument(row, FIRST_ARGUMENT), 1)


@kernel
def read_first(thread: int, num_threads: int, row: int) -> None:
    if thread == 0:
        store_i64(argument(row, FIRST_ARGUMENT + 1), load_i64(argument(row, FIRST_ARGUMENT)))


def shifts(num_ops: int) -> tuple[OpList, np.ndarray, np.ndarray]:
    first, second = np.zeros(COUNT, np.int64), np.zeros(COUNT, np.int64)
    ops = OpList(num_ops)
    for index in range(num_ops):
        source, target = (first, second) if index % 2 == 0 else (second, first)
        ops.append(shift, source.ctypes.data, target.ctypes.data)
    return ops, first, second


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
def test_every_op_sees_what_the_one_before_wrote(num_threads: int) -> None:
    pool = ThreadPool(num_threads)
    ops, first, second = shifts(400)
    for step in range(1, 6):
        pool.run(ops)
        assert (first == 400 * step).all()
        assert (second == 400 * step - 1).all()
    pool.close()


def test_workers_sleep_and_wake() -> None:
    pool = ThreadPool(3, num_spins=10)
    ops, first, _ = shifts(2)
    for step in range(1, 20):
        time.sleep(0.002)
        pool.run(ops)
        assert (first == 2 * step).all()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1  # nobody spins
    pool.close()


def test_every_thread_runs_every_op_and_reads_the_tokens_of_the_step() -> None:
    counts = np.zeros(2, np.int64)
    ops = OpList(2)
    for _ in range(2):
        ops.append(count_threads, counts.ctypes.data, num_tokens=1, barrier=False)
    pool = ThreadPool(2)
    pool.run(ops)
    ops.rows[0, COLUMN_NUM_TOKENS] = 5
    pool.run(ops)
    assert counts.tolist() == [8, 8]
    pool.close()


def test_float_arguments_and_denormals() -> None:
    value = np.array([3.0], np.float32)
    pool = ThreadPool(2)
    for factor, expected in ((-0.25, -0.75), (1e-39, 0.0)):  # denormal times number is zero
        ops = OpList(1)
        ops.append(scale, value.ctypes.data, float_bits(factor))
        pool.run(ops)
        assert value[0] == expected
    assert np.float32(1e-38) * np.float32(0.1) != 0  # the caller's own arithmetic keeps denormals
    pool.close()


def test_ops_are_timed() -> None:
    pool = ThreadPool(2)
    ops, first, _ = shifts(10)
    nanoseconds = pool.run_timed(ops)
    assert nanoseconds.shape == (10,)
    assert (nanoseconds >= 0).all()
    assert nanoseconds.sum() > 0
    assert (first == 10).all()
    pool.close()


def test_a_timed_op_is_over_when_its_time_is() -> None:
    """All threads meet after it, though the next one need not wait: what the last thread still does is its own time."""
    pool = ThreadPool(2)
    values = np.zeros(2, np.int64)
    ops = OpList(2)
    ops.append(write_late, values.ctypes.data, barrier=False)
    ops.append(read_first, values.ctypes.data, values.ctypes.data + 8)
    pool.run_timed(ops)
    assert values.tolist() == [200_000, 200_000]
    pool.close()


def test_two_pools_and_many_callers() -> None:
    pools = [ThreadPool(2, num_spins=100), ThreadPool(3, num_spins=100)]
    lists = [shifts(4) for _ in range(4)]

    def call(index: int) -> None:
        for _ in range(30):
            pools[index % 2].run(lists[index][0])

    callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [int(first[0]) for _, first, _ in lists] == [120] * 4
    for pool in pools:
        pool.close()


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tokenmill-cpu")]


def test_threads_end_with_their_pool() -> None:
    gc.collect()  # pools of tests before this one
    before = len(workers())
    pool = ThreadPool(3)
    assert len(workers()) == before + 2
    pool.close()
    pool.close()
    assert len(workers()) == before
    ThreadPool(2)
    gc.collect()
    assert len(workers()) == before


def _run_in_child(pool: ThreadPool, ops: OpList, results: multiprocessing.SimpleQueue[int]) -> None:
    pool.run(ops)
    results.put(0)


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pool_works_in_a_forked_child() -> None:
    pool = ThreadPool(2)
    ops, _, _ = shifts(4)
    pool.run(ops)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_run_in_child, args=(pool, ops, results))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    pool.run(ops)
    pool.close()


def test_a_process_ends_while_its_pool_is_open() -> None:
    program = "from tokenmill.ops.cpu.threads import ThreadPool; pool = ThreadPool(3); print('done')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_a_pool_ends_between_two_steps() -> None:
    """Within a step one worker would leave, and another wait for it."""
    gc.collect()
    pool = ThreadPool(3)
    before = workers()
    with pool._lock:  # a step is under way
        ending = threading.Thread(target=pool.close)
        ending.start()
        ending.join(0.3)
        assert ending.is_alive()
        assert workers() == before
    ending.join(30)
    assert len(workers()) == len(before) - 2


def test_a_process_does_not_wait_for_the_compiler_to_end() -> None:
    """The pool's own functions are compiled when it starts."""
    program = """
import threading, time
from llvmlite.binding.ffi import lib
from tokenmill.ops.cpu.threads import ThreadPool
pool = ThreadPool(3)
has_lock = threading.Event()

def compile_for_long():
    with lib._lock:
        has_lock.set()
        time.sleep(1000)

threading.Thread(target=compile_for_long, daemon=True).start()
has_lock.wait()
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


def test_bad_values_are_refused() -> None:
    with pytest.raises(InvalidParameterError, match="num_threads is 0"):
        ThreadPool(0)
    ops = OpList(1)
    with pytest.raises(AssertionError, match="too many"):
        ops.append(shift, *[0] * ROW_SIZE)
    ops.append(shift, 0, 0)
    with pytest.raises(AssertionError, match="full"):
        ops.append(shift, 0, 0)
    pool = ThreadPool(1)
    pool.close()
    with pytest.raises(AssertionError, match="closed"):
        pool.run(ops)
