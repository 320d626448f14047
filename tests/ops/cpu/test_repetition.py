"""Steps that follow each other natively: how far they go, and what they leave behind."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tokenmill.engine.plan import Interruption
from tokenmill.ops.cpu.intrinsics import argument, chunk_range
from tokenmill.ops.cpu.jit import kernel
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS, FIRST_ARGUMENT
from tokenmill.ops.cpu.repetition import Repetition
from tokenmill.ops.cpu.scalars import load_i64, store_i32, store_i64
from tokenmill.ops.cpu.simd import load_i32
from tokenmill.ops.cpu.threads import OpList, ThreadPool

pytestmark = pytest.mark.spec("C1")
NUM_ROWS, MAX_STEPS, NUM_COLUMNS = 3, 12, 1000


@kernel
def advance(thread: int, num_threads: int, row: int) -> None:
    """Step number and tokens of the step before become the input, for as many rows as the op has tokens."""
    first, end = chunk_range(thread, num_threads, argument(row, COLUMN_NUM_TOKENS))
    tokens, inputs = argument(row, FIRST_ARGUMENT), argument(row, FIRST_ARGUMENT + 1)
    for index in range(first, end):
        store_i32(inputs + 4 * index, load_i32(tokens + 4 * index))


@kernel
def spread(thread: int, num_threads: int, row: int) -> None:
    """Work of all threads: columns[i] = the first row's input + i."""
    first, end = chunk_range(thread, num_threads, NUM_COLUMNS)
    inputs, columns = argument(row, FIRST_ARGUMENT + 1), argument(row, FIRST_ARGUMENT + 2)
    for index in range(first, end):
        store_i32(columns + 4 * index, load_i32(inputs) + index)


@kernel
def answer(thread: int, num_threads: int, row: int) -> None:
    """Tokens of the step, from a script [steps, rows] plus a column that every thread wrote; at one step the word of an
    interruption."""
    if thread != 0:
        return
    tokens, columns = argument(row, FIRST_ARGUMENT), argument(row, FIRST_ARGUMENT + 2)
    script, counter = argument(row, FIRST_ARGUMENT + 3), argument(row, FIRST_ARGUMENT + 4)
    step = load_i64(counter)
    for index in range(NUM_ROWS):
        change = load_i32(columns + 4 * (NUM_COLUMNS - 1)) - (NUM_COLUMNS - 1)  # the first row's input
        token = load_i32(script + 4 * (step * NUM_ROWS + index))
        store_i32(tokens + 4 * index, token if token < 0 else token + 1000 * (change % 7))
    store_i64(counter, step + 1)
    if argument(row, FIRST_ARGUMENT + 5) == step:
        store_i64(argument(row, FIRST_ARGUMENT + 6), 1)


class Steps:
    """An op list whose tokens follow a script."""

    def __init__(self, num_threads: int = 2) -> None:
        self.script = np.arange(MAX_STEPS * NUM_ROWS, dtype=np.int32).reshape(MAX_STEPS, NUM_ROWS) % 11
        self.tokens, self.inputs = np.zeros(NUM_ROWS, np.int32), np.full(NUM_ROWS, 5, np.int32)
        self.columns = np.zeros(NUM_COLUMNS, np.int32)
        self.end_ids = np.full((NUM_ROWS, 2), -1, np.int32)
        self.counter = np.zeros(1, np.int64)
        self.interruption = Interruption()
        self.interrupted_step = -1
        self.pool = ThreadPool(num_threads)
        self.repetition = Repetition(self.tokens, self.end_ids, MAX_STEPS)

    def run(self, max_steps: int, seconds: float = 60.0) -> list[list[int]]:
        arrays = (self.tokens, self.inputs, self.columns, self.script, self.counter)
        arguments = [array.ctypes.data for array in arrays]
        ops = OpList(3)
        for function in (advance, spread, answer):
            ops.append(function, *arguments, self.interrupted_step, self.interruption.address)
        self.repetition.set(NUM_ROWS, max_steps, seconds, self.interruption.address)
        num_steps = self.pool.run_steps(ops, self.repetition)
        found = self.repetition.found(num_steps)
        assert found.shape == (NUM_ROWS, num_steps)
        return found.tolist()


def expected(script: np.ndarray, num_steps: int, first_input: int = 5) -> list[list[int]]:
    """The same in plain Python."""
    found, current = [], first_input
    for step in range(num_steps):
        found.append([int(token) + 1000 * (current % 7) for token in script[step]])
        current = found[-1][0]
    return [list(row) for row in zip(*found, strict=True)]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_each_step_has_the_tokens_of_the_one_before(num_threads: int) -> None:
    steps = Steps(num_threads)
    assert steps.run(MAX_STEPS) == expected(steps.script, MAX_STEPS)
    assert steps.inputs.tolist() == [row[-2] for row in expected(steps.script, MAX_STEPS)]
    steps.counter[0], steps.inputs[:] = 0, 5
    assert steps.run(1) == expected(steps.script, 1)
    assert steps.inputs.tolist() == [5] * NUM_ROWS, "the first step's input is the caller's"
    steps.pool.close()


def test_a_step_without_a_token_is_not_told_and_comes_first_next_time() -> None:
    steps = Steps()
    steps.script[4, 1] = -1
    assert steps.run(MAX_STEPS) == expected(steps.script, 4)
    steps.counter[0] = 4
    assert steps.run(MAX_STEPS)[1] == [-1]


@pytest.mark.parametrize("row", range(NUM_ROWS))
def test_a_step_that_ends_a_row_is_the_last(row: int) -> None:
    steps = Steps()
    whole = expected(steps.script, MAX_STEPS)
    steps.end_ids[row, 1] = whole[row][3]
    steps.end_ids[(row + 1) % NUM_ROWS, 0] = whole[row][2]  # ends another row
    assert whole[row][2] not in whole[(row + 1) % NUM_ROWS] and whole[row][3] not in whole[row][:3]
    assert steps.run(MAX_STEPS) == expected(steps.script, 4)


def test_an_interruption_waits_for_the_step_under_way() -> None:
    steps = Steps()
    steps.interrupted_step = 5
    assert steps.run(MAX_STEPS) == expected(steps.script, 6)
    steps.interrupted_step, steps.counter[0], steps.inputs[:] = -1, 0, 5
    assert steps.run(MAX_STEPS) == expected(steps.script, 1), "somebody waits still"
    steps.interruption.clear()
    assert not steps.interruption.is_set
    steps.counter[0], steps.inputs[:] = 0, 5
    assert steps.run(MAX_STEPS) == expected(steps.script, MAX_STEPS)


def test_no_step_begins_that_would_end_too_late() -> None:
    steps = Steps()
    assert steps.run(MAX_STEPS, seconds=0.0) == expected(steps.script, 1)
    steps.counter[0], steps.inputs[:] = 0, 5
    begin = time.perf_counter()
    steps.run(MAX_STEPS, seconds=60.0)
    assert time.perf_counter() - begin < 60.0
    with pytest.raises(AssertionError, match="room"):
        steps.repetition.set(NUM_ROWS, MAX_STEPS + 1, 1.0, steps.interruption.address)
