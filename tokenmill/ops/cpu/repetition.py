"""Native code that walks one op list several times: a step of greedy decoding and those that follow. See `threads.py`.

Between two steps the leader looks whether it should stop; workers see nothing of it, and spin for less than a
microsecond. What it needs to know stands in a block of int64, `Repetition.words`.
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from tokenmill.ops.cpu.intrinsics import argument, flush_denormals, load_acquire, pointer, restore_rounding
from tokenmill.ops.cpu.jit import NativeFunction, device
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS
from tokenmill.ops.cpu.native_types import int64
from tokenmill.ops.cpu.scalars import load_i64, store_i32, store_i64
from tokenmill.ops.cpu.simd import I32, I64, declare, load_i32, operation
from tokenmill.ops.cpu.walker import OPS, lead_walk

# Words of the block.
MAX_STEPS: Final = 0
NANOSECONDS: Final = 1  # no step begins that is expected to end later than so long after the first one's begin
NUM_ROWS: Final = 2
INTERRUPTION: Final = 3  # address of an int64; not 0: stop
TOKENS: Final = 4  # address of int32 [rows], which a step writes
FOUND: Final = 5  # address of int32 [MAX_STEPS, rows]
END_IDS: Final = 6  # address of int32 [rows, NUM_END_IDS]
NUM_END_IDS: Final = 7
CLOCK: Final = 8  # seconds and nanoseconds
NUM_WORDS: Final = 10

CLOCK_MONOTONIC: Final = int(getattr(time, "CLOCK_MONOTONIC", 1))

# What a step's tokens say.
GOES_ON: Final = 0
ENDS: Final = 1  # one of them ends its row
FAILED: Final = 2  # one of them is none


class Repetition:
    """What the tokens of a step are, and where those of all steps go.

    Args:
        tokens: int32 [most rows], which the ops write: each row's token, negative where it has none.
        end_ids: int32 [most rows, n]: after a step with one of these tokens in its row there is no other.
        max_steps: the most that will be asked for.
    """

    def __init__(self, tokens: npt.NDArray[np.int32], end_ids: npt.NDArray[np.int32], max_steps: int) -> None:
        self._kept = tokens, end_ids
        self._found: npt.NDArray[np.int32] = np.zeros(max_steps * len(tokens), np.int32)
        self.words: npt.NDArray[np.int64] = np.zeros(NUM_WORDS, np.int64)
        self.words[[TOKENS, FOUND, END_IDS]] = tokens.ctypes.data, self._found.ctypes.data, end_ids.ctypes.data
        self.words[NUM_END_IDS] = end_ids.shape[1]
        self.address = self.words.ctypes.data

    def set(self, num_rows: int, max_steps: int, seconds: float, interruption: int) -> None:
        """Say how far to go.

        Args:
            num_rows: of the steps.
            max_steps: 1 or more.
            seconds: for all of them together, as far as can be foreseen.
            interruption: address of an int64 that others set to stop them; the first step is done in any case.
        """
        assert max_steps * num_rows <= len(self._found), "more steps than there is room for"
        self.words[:TOKENS] = max_steps, int(seconds * 1e9), num_rows, interruption

    def found(self, num_steps: int) -> npt.NDArray[np.int32]:
        """The tokens of the steps that were done, [rows, steps], good until the next ones."""
        num_rows = int(self.words[NUM_ROWS])
        return self._found[: num_steps * num_rows].reshape(num_steps, num_rows).T


@operation(int64, int64)
def nanoseconds(builder: ir.IRBuilder, place: ir.Value) -> ir.Value:
    """A clock that runs at a constant rate; `place` has room for two int64."""
    words = pointer(builder, place, I64)
    builder.call(declare(builder, "clock_gettime", I32, [I32, words.type]), [I32(CLOCK_MONOTONIC), words])
    seconds, rest = (builder.load(builder.gep(words, [I64(index)]), align=8) for index in (0, 1))
    return builder.add(builder.mul(seconds, I64(1_000_000_000)), rest)


@device
def keep_tokens(repetition: int, num_steps: int) -> int:
    """Copy the tokens of a step, of which there were `num_steps` before; says what they mean."""
    num_rows, num_end_ids = argument(repetition, NUM_ROWS), argument(repetition, NUM_END_IDS)
    tokens, end_ids = argument(repetition, TOKENS), argument(repetition, END_IDS)
    target = argument(repetition, FOUND) + 4 * num_steps * num_rows
    has_end, has_failed = 0, 0
    for row in range(num_rows):
        token = load_i32(tokens + 4 * row)
        store_i32(target + 4 * row, token)
        if token < 0:
            has_failed = 1
        for index in range(num_end_ids):
            if load_i32(end_ids + 4 * (row * num_end_ids + index)) == token:
                has_end = 1
    return FAILED if has_failed != 0 else has_end


def _lead(control: int, num_threads: int, repetition: int) -> int:
    rounding = flush_denormals()
    clock = repetition + 8 * CLOCK
    begin = nanoseconds(clock)
    num_steps = 0
    while True:
        lead_walk(control, num_threads)
        meaning = keep_tokens(repetition, num_steps)
        if meaning == FAILED and num_steps > 0:
            break
        num_steps += 1
        if meaning != GOES_ON or num_steps >= argument(repetition, MAX_STEPS):
            break
        if load_acquire(argument(repetition, INTERRUPTION)) != 0:
            break
        spent = nanoseconds(clock) - begin
        if spent + spent // num_steps > argument(repetition, NANOSECONDS):
            break
        store_i64(load_i64(control + OPS) + 8 * COLUMN_NUM_TOKENS, argument(repetition, NUM_ROWS))
    restore_rounding(rounding)
    return num_steps


lead_steps: Final[Any] = NativeFunction(_lead, int64(int64, int64, int64))
"""(control, num_threads, repetition): how many steps were done.

The first op of the list makes a step's tokens the input of the next one; its number of tokens is 0 in the first step. A
further step that gave a row no token is not counted: it comes first next time.
"""
