"""The op `head_screen`: the most likely token of one row from half of the output head's bytes, the same as `argmax`'s.

A greedy step needs the largest logit alone. Beside the packed head (8-bit values) lies its screen: the high halves of
all values, and the low halves of the few columns in which hidden states are largest. It gives each logit up to an error
that is known to be below a bound; a tile of 16 rows is computed exactly only if one of its bounds reaches the largest
logit that is known. Three rows of the op list, with a barrier after each:

1. `SEARCH`: each thread screens its tiles and computes the one that looks best exactly.
2. `CHECK`: the largest of these logits is the threshold; each thread computes its tiles that may reach it.
3. `CHOOSE`: the token, as `argmax` chooses it.

**Why the token is the same.** For a row, let w_g be the scale of group g and v its values; x_g, s_g and z_g the values,
the scale and scale * sum of the activations; |.| the sum of magnitudes; u = 2^-24, T = 383 * sum of |w_g| s_g |x_g|.

- The exact kernel computes the sum of w_g (s_g v.x_g - 128 z_g). Since |v.x_g| <= 255 |x_g| and |z_g| <= s_g |x_g|, its
  rounding errors are at most (2 G + 3) u T with G groups.
- The screen has 7.5 in place of the low half of v in all columns but the exact ones. So it lacks w_g s_g (e_g.x_g),
  where e_g are low halves less 7.5 in these columns: at most |w_g| s_g times their norms (Cauchy and Schwarz).
- It takes z_g for s_g times the sum of x_g (u T at most), and with Q exact quads its terms are at most T, their
  rounding errors (G + Q + 6) u T, and that of adding the bound u T.
- These are less than (4 (G + Q) + 32) u T, which is `prepare`'s slack. Norms are made 0.1 % larger for the rounding of
  the bounds themselves, and `TINY` is for numbers that are flushed to zero.

A row whose logit and bound add up to less than the exact logit of another row is not the largest, nor equal to it. With
weights that are not finite they are infinite or not a number, and with activations too large to exclude infinite sums
(`LARGEST_SCALE`) bounds are made infinite: such rows are computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from tokenmill.ops.cpu.argmax import LARGEST, NOT_FINITE
from tokenmill.ops.cpu.cpu_features import DotProduct
from tokenmill.ops.cpu.intrinsics import argument, chunk_range
from tokenmill.ops.cpu.jit import NativeFunction, device
from tokenmill.ops.cpu.layout import FIRST_ARGUMENT, GROUP_BYTES, GROUP_SIZE
from tokenmill.ops.cpu.linear_blocks import STEPS, VECTOR_BYTES, gemv_block
from tokenmill.ops.cpu.linear_int8 import LinearWeight
from tokenmill.ops.cpu.packing import ENCODINGS, ROW_BLOCK, encoding_of, num_groups
from tokenmill.ops.cpu.scalars import load_i8, load_i64, store_i32, store_i64
from tokenmill.ops.cpu.screen_blocks import (
    ERROR_STEPS,
    GROUP_ERROR,
    GROUP_PREPARED,
    GROUP_SCALE,
    GROUP_SHIFT,
    GROUP_SLACK,
    LOW_HALVES,
    MIDDLE,
    QUAD_BYTES,
    QUAD_OFFSET,
    QUAD_PREPARED,
    QUAD_SCALE,
    QUAD_SHIFT,
    QUAD_VALUES,
    SCREEN_GROUP_BYTES,
    pack_group,
    pack_quads,
    screen_tile,
)
from tokenmill.ops.cpu.simd import (
    absolute,
    add,
    broadcast,
    float32,
    keep_lanes,
    load,
    load_f32,
    load_i32,
    load_int8,
    maximum,
    minimum,
    multiply,
    reduce_add,
    reduce_max,
    store_f32,
)

# Columns of the op row.
VALUES: Final = FIRST_ARGUMENT  # address of the row's activations
WEIGHT: Final = FIRST_ARGUMENT + 1  # address of the packed head
NUM_GROUPS: Final = FIRST_ARGUMENT + 2
NUM_ROWS: Final = FIRST_ARGUMENT + 3  # of the head
SCREEN: Final = FIRST_ARGUMENT + 4  # address of `screen_bytes(...)`
NUM_QUADS: Final = FIRST_ARGUMENT + 5
QUADS: Final = FIRST_ARGUMENT + 6  # address of int64 [quads], `ExactQuads.quads`
MASKS: Final = FIRST_ARGUMENT + 7  # address of int32 [groups, 8]
CONSTANTS: Final = FIRST_ARGUMENT + 8  # address of float32 [groups]
SCRATCH: Final = FIRST_ARGUMENT + 9  # address of `screen_scratch_bytes(...)`
SCRATCH_BYTES: Final = FIRST_ARGUMENT + 10  # of one thread
TOKEN: Final = FIRST_ARGUMENT + 11  # address of int32
COUNTS: Final = FIRST_ARGUMENT + 12  # address of int64 [2]
PART: Final = FIRST_ARGUMENT + 13  # of the following

SEARCH: Final = 0
CHECK: Final = 1
CHOOSE: Final = 2

# Scratch memory of a thread; then what is prepared of the token, and, for all threads, a bound for each tile.
TOTALS: Final = 0  # float32 [2, 16]
BEST: Final = 128  # float32, the largest logit that it has computed
BEST_ROW: Final = 132  # int32
IS_NUMBER: Final = 136  # int32, 0 if one of its logits is none
NUM_EXACT: Final = 140  # int32, tiles that it has computed
THRESHOLD: Final = 144  # float32, the largest logit that its search has found
PREPARED: Final = 192

INFINITY: Final = float("inf")
LARGEST_SCALE: Final = 1e20
"""Of activations; with smaller ones and float16 weights no sum becomes infinite."""

ERROR_FACTOR: Final = 1.001 / ERROR_STEPS
ROUNDING: Final = 383 * 2.0**-24
SHIFT: Final = MIDDLE - 128


@dataclass(frozen=True, slots=True)
class ExactQuads:
    """Which columns of a screen are exact, as kernels read it.

    Args:
        quads: int64 [Q], quad q is columns 4 q to 4 q + 3; Q is a multiple of 2.
        masks: int32 [groups, 8], see `pack_group`.
        constants: float32 [groups], likewise.
    """

    quads: npt.NDArray[np.int64]
    masks: npt.NDArray[np.int32]
    constants: npt.NDArray[np.float32]

    @staticmethod
    def of(quads: npt.NDArray[np.integer], groups: int) -> ExactQuads:
        """The tables for these quads, of a weight with so many groups."""
        masks = np.full((groups, STEPS), LOW_HALVES, np.int32)
        masks.reshape(-1)[quads] = 0
        constants = (np.count_nonzero(masks, axis=1) * 4 * MIDDLE**2).astype(np.float32)
        return ExactQuads(np.sort(quads).astype(np.int64), masks, constants)


def can_screen(weight_format: str, way: DotProduct) -> bool:
    """Whether there is a screen for a packed head, which is worth it."""
    encoding = encoding_of(weight_format)
    return encoding.bits == 8 and encoding.scale_bytes == 2 and way is not DotProduct.PORTABLE


def screen_bytes(num_rows: int, num_columns: int, num_quads: int) -> int:
    """Size of a screen."""
    return -(-num_rows // ROW_BLOCK) * (num_groups(num_columns) * SCREEN_GROUP_BYTES + num_quads * QUAD_BYTES)


def thread_scratch_bytes(num_columns: int, num_quads: int) -> int:
    """Scratch memory of one thread."""
    size = PREPARED + num_groups(num_columns) * GROUP_PREPARED + num_quads * QUAD_PREPARED
    return -(-size // VECTOR_BYTES) * VECTOR_BYTES


def screen_scratch_bytes(num_rows: int, num_columns: int, num_quads: int, num_threads: int) -> int:
    """Scratch memory of all threads."""
    return num_threads * thread_scratch_bytes(num_columns, num_quads) + 4 * -(-num_rows // ROW_BLOCK)


@device
def prepare(row: int, groups: int) -> int:
    """Write what the screen needs to know of the token; the address of the quads' part."""
    values, count, num_quads = argument(row, VALUES), argument(row, NUM_GROUPS), argument(row, NUM_QUADS)
    quads = groups + count * GROUP_PREPARED
    slack = float32(ROUNDING) * float32(4 * (count + num_quads) + 32)
    for group in range(count):
        token, prepared = values + group * GROUP_BYTES, groups + group * GROUP_PREPARED
        scale, scaled_sum = load_f32(token + GROUP_SIZE), load_f32(token + GROUP_SIZE + 4)
        low, high = load_int8(token), load_int8(token + GROUP_SIZE // 2)
        store_f32(prepared + GROUP_SCALE, scale * float32(16.0))
        store_f32(prepared + GROUP_SHIFT, scaled_sum * float32(SHIFT))
        store_f32(prepared + GROUP_ERROR, reduce_add(add(multiply(low, low), multiply(high, high))))  # a square yet
        store_f32(prepared + GROUP_SLACK, slack * scale * reduce_add(add(absolute(low), absolute(high))))
    for index in range(num_quads):
        quad = load_i64(argument(row, QUADS) + 8 * index)
        group, step = quad // STEPS, quad % STEPS
        token, prepared = values + group * GROUP_BYTES, quads + index * QUAD_PREPARED
        total, square = 0, 0
        for column in range(4):
            value = load_i8(token + 4 * step + column)
            total += value
            square += value * value
        scale = load_f32(token + GROUP_SIZE)
        store_i64(prepared + QUAD_OFFSET, group * SCREEN_GROUP_BYTES)
        store_i32(prepared + QUAD_VALUES, load_i32(token + 4 * step))
        store_f32(prepared + QUAD_SCALE, scale)
        store_f32(prepared + QUAD_SHIFT, float32(-MIDDLE) * scale * float32(total))
        place = groups + group * GROUP_PREPARED + GROUP_ERROR
        store_f32(place, load_f32(place) - float32(square))  # whole numbers: exact
    for group in range(count):
        scale, prepared = load_f32(values + group * GROUP_BYTES + GROUP_SIZE), groups + group * GROUP_PREPARED
        error = math.sqrt(load_f32(prepared + GROUP_ERROR)) * scale * float32(ERROR_FACTOR)
        store_f32(prepared + GROUP_ERROR, error if scale < LARGEST_SCALE else float32(INFINITY))
        if not scale < LARGEST_SCALE:
            store_f32(prepared + GROUP_SLACK, float32(INFINITY))
    return quads


@device
def look_at(row: int, scratch: int, tile: int) -> None:
    """Take note of the exact logits of a tile, which are in the scratch memory."""
    best, best_row = load_f32(scratch + BEST), load_i32(scratch + BEST_ROW)
    is_number = load_i32(scratch + IS_NUMBER)
    for lane in range(min(argument(row, NUM_ROWS) - tile * ROW_BLOCK, ROW_BLOCK)):
        value = load_f32(scratch + TOTALS + 4 * lane)
        is_number = is_number if value == value else 0
        if value > best:  # rows come in order: of equal ones the first
            best, best_row = value, tile * ROW_BLOCK + lane
    store_f32(scratch + BEST, best)
    store_i32(scratch + BEST_ROW, best_row)
    store_i32(scratch + IS_NUMBER, is_number)
    store_i32(scratch + NUM_EXACT, load_i32(scratch + NUM_EXACT) + 1)


@device
def forget(scratch: int) -> None:
    """Begin without logits."""
    store_f32(scratch + BEST, float32(-INFINITY))
    store_i32(scratch + BEST_ROW, 0)
    store_i32(scratch + IS_NUMBER, 1)
    store_i32(scratch + NUM_EXACT, 0)


@device
def choose(row: int, num_threads: int) -> None:
    """Put together what the threads have found."""
    best, best_row, is_number, num_exact = float32(-INFINITY), 0, True, 0
    for thread in range(num_threads):
        scratch = argument(row, SCRATCH) + thread * argument(row, SCRATCH_BYTES)
        value = load_f32(scratch + BEST)
        if value > best:  # threads have rows in their order
            best, best_row = value, load_i32(scratch + BEST_ROW)
        is_number = is_number and load_i32(scratch + IS_NUMBER) == 1
        num_exact += load_i32(scratch + NUM_EXACT)
    is_finite = is_number and -LARGEST <= best <= LARGEST
    store_i32(argument(row, TOKEN), best_row if is_finite else NOT_FINITE)
    counts = argument(row, COUNTS)
    store_i64(counts, load_i64(counts) + num_exact)
    store_i64(counts + 8, load_i64(counts + 8) + 1)


@device
def threshold_of(row: int, num_threads: int) -> float:
    """The largest logit that a search has found."""
    largest = float32(-INFINITY)
    for thread in range(num_threads):
        value = load_f32(argument(row, SCRATCH) + thread * argument(row, SCRATCH_BYTES) + THRESHOLD)
        largest = value if value > largest else largest
    return largest


@cache
def head_screen_kernel(weight_format: str, way: DotProduct) -> NativeFunction:
    """The op's kernel for packed heads of a format. Its exact logits have the bits of `linear_kernel`'s.

    Args:
        weight_format: `can_screen` is true for it.
        way: how to compute dot products.
    """
    encoding, dot = ENCODINGS.index(encoding_of(weight_format)), int(way)
    group_bytes = ENCODINGS[encoding].group_bytes

    def head_screen(thread: int, num_threads: int, row: int) -> None:
        count, num_quads, values = argument(row, NUM_GROUPS), argument(row, NUM_QUADS), argument(row, VALUES)
        num_tiles = (argument(row, NUM_ROWS) + ROW_BLOCK - 1) // ROW_BLOCK
        bounds = argument(row, SCRATCH) + num_threads * argument(row, SCRATCH_BYTES)
        scratch = argument(row, SCRATCH) + thread * argument(row, SCRATCH_BYTES)
        weight, block_bytes = argument(row, WEIGHT), count * group_bytes
        first, end = chunk_range(thread, num_threads, num_tiles)
        if argument(row, PART) == SEARCH:
            groups = scratch + PREPARED
            quads = prepare(row, groups)
            tile_bytes = count * SCREEN_GROUP_BYTES + num_quads * QUAD_BYTES
            place = argument(row, SCREEN) + first * tile_bytes
            best, best_tile = float32(-INFINITY), -1
            for tile in range(first, end):
                screen_tile(dot, place, values, groups, count, quads, num_quads, scratch + TOTALS)
                place += tile_bytes
                logits = load(scratch + TOTALS)
                # What is not a number may be anything.
                reach = minimum(add(logits, load(scratch + TOTALS + VECTOR_BYTES)), broadcast(float32(INFINITY)))
                rows = argument(row, NUM_ROWS) - tile * ROW_BLOCK
                if rows < ROW_BLOCK:
                    logits = keep_lanes(logits, 0, rows, float32(-INFINITY))
                    reach = keep_lanes(reach, 0, rows, float32(-INFINITY))
                store_f32(bounds + 4 * tile, reduce_max(reach))
                largest = reduce_max(maximum(logits, broadcast(float32(-INFINITY))))
                if largest > best:
                    best, best_tile = largest, tile
            forget(scratch)
            if best_tile >= 0:
                gemv_block(encoding, dot, weight + best_tile * block_bytes, values, count, scratch + TOTALS)
                look_at(row, scratch, best_tile)
            store_f32(scratch + THRESHOLD, load_f32(scratch + BEST))
        elif argument(row, PART) == CHECK:
            threshold = threshold_of(row, num_threads)
            forget(scratch)
            for tile in range(first, end):
                if load_f32(bounds + 4 * tile) >= threshold:
                    gemv_block(encoding, dot, weight + tile * block_bytes, values, count, scratch + TOTALS)
                    look_at(row, scratch, tile)
                    threshold = max(threshold, load_f32(scratch + BEST))
        elif thread == 0:
            choose(row, num_threads)

    return NativeFunction(head_screen)


@cache
def pack_screen_kernel(weight_format: str, way: DotProduct) -> NativeFunction:
    """Writes the screen of a packed head; its arguments are those of `head_screen_kernel`."""
    encoding, dot = ENCODINGS.index(encoding_of(weight_format)), int(way)
    group_bytes, offset = ENCODINGS[encoding].group_bytes, ENCODINGS[encoding].values_offset

    def pack_screen(thread: int, num_threads: int, row: int) -> None:
        count, num_quads, quads = argument(row, NUM_GROUPS), argument(row, NUM_QUADS), argument(row, QUADS)
        tile_bytes = count * SCREEN_GROUP_BYTES + num_quads * QUAD_BYTES
        num_tiles = (argument(row, NUM_ROWS) + ROW_BLOCK - 1) // ROW_BLOCK
        first, end = chunk_range(thread, num_threads, num_tiles)
        for tile in range(first, end):
            source = argument(row, WEIGHT) + tile * count * group_bytes
            target = argument(row, SCREEN) + tile * tile_bytes
            for group in range(count):
                masks, constants = argument(row, MASKS) + 4 * STEPS * group, argument(row, CONSTANTS) + 4 * group
                pack_group(encoding, dot, source + group * group_bytes, target, masks, constants)
                target += SCREEN_GROUP_BYTES
            for index in range(0, num_quads, 2):
                one, other = load_i64(quads + 8 * index), load_i64(quads + 8 * index + 8)
                pack_quads(
                    source + one // STEPS * group_bytes + offset + one % STEPS * VECTOR_BYTES,
                    source + other // STEPS * group_bytes + offset + other % STEPS * VECTOR_BYTES,
                    target,
                )
                target += VECTOR_BYTES

    return NativeFunction(pack_screen)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreenPlaces:
    """Where a screen and what belongs to it lie.

    Args:
        values: address of the row's activations, int8_group32 of one token.
        weight: the packed head.
        screen: address of `screen_bytes(...)`, a multiple of 64.
        exact: the exact columns; it must live as long as the op.
        scratch: address of `screen_scratch_bytes(...)` bytes, a multiple of 64.
        token: address of int32, the most likely token; `NOT_FINITE` as `argmax` gives it.
        counts: address of int64 [2]: how many tiles were computed exactly, and how many tokens found, are added.
    """

    values: int
    weight: LinearWeight
    screen: int
    exact: ExactQuads
    scratch: int
    token: int
    counts: int

    def arguments(self) -> tuple[tuple[int, ...], ...]:
        """Columns of the op's three rows, in order; the first one is also that of `pack_screen_kernel`."""
        columns, num_quads = self.weight.num_columns, len(self.exact.quads)
        shared = (
            *(self.values, self.weight.address, num_groups(columns), self.weight.num_rows, self.screen, num_quads),
            *(self.exact.quads.ctypes.data, self.exact.masks.ctypes.data, self.exact.constants.ctypes.data),
            *(self.scratch, thread_scratch_bytes(columns, num_quads), self.token, self.counts),
        )
        return tuple((*shared, part) for part in (SEARCH, CHECK, CHOOSE))
