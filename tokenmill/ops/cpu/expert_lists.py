"""Which experts take which tokens: `choose_experts` and `list_experts`, the first two ops of a mixture of experts.

With E experts and k of them for each of T tokens there are T k pairs of a token and an expert, numbered t k + j. The
lists sort them by expert: row r of the sorted pairs is one row of the experts' products, so nothing grows with E T.
Everything is int64, int32 or float32 at addresses that `ExpertLists` gives:

| part | content |
|---|---|
| header | int64 [4]: pairs, experts that have any, panels of their inputs, not used |
| experts | int64 [E, 4]: rows of the expert, its first row of inputs, of inner values, and of the sorted pairs |
| chosen | int32 [T k]: the expert of each pair, by falling share |
| shares | float32 [T k] |
| tokens | int32 [T k]: the token of each row |
| rows | int32 [T k]: the row of each pair |

Inputs and inner values may be `int8_group32`: an expert's rows are then panels of their own, of the width that its
number of rows has (see `layout.py`), so first rows count rows of whole panels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tokenmill.errors import InvalidParameterError
from tokenmill.ops.cpu.intrinsics import argument, chunk_range, device_panel_width
from tokenmill.ops.cpu.jit import device, kernel
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS, FIRST_ARGUMENT, MAX_PANEL_WIDTH
from tokenmill.ops.cpu.scalars import load_i64, store_i32, store_i64
from tokenmill.ops.cpu.simd import (
    LANES,
    add,
    broadcast,
    divide,
    keep_lanes,
    load_f32,
    load_first,
    load_i32,
    reduce_add,
    store_f32,
    store_first,
    subtract,
)
from tokenmill.ops.cpu.vector_math import exp

# Columns of the op rows; both ops have the same.
LISTS: Final = FIRST_ARGUMENT  # address of the header; the experts follow
NUM_EXPERTS: Final = FIRST_ARGUMENT + 1
TOP_K: Final = FIRST_ARGUMENT + 2
CHOSEN: Final = FIRST_ARGUMENT + 3
SHARES: Final = FIRST_ARGUMENT + 4
TOKENS: Final = FIRST_ARGUMENT + 5
ROWS: Final = FIRST_ARGUMENT + 6
LOGITS: Final = FIRST_ARGUMENT + 7  # address of float32 [T, E]
LOGITS_STRIDE: Final = FIRST_ARGUMENT + 8  # bytes from token to token
NORMALIZE: Final = FIRST_ARGUMENT + 9  # 1: shares of a token sum up to 1

# Byte offsets in the header, and in the entry of an expert.
NUM_PAIRS: Final = 0
NUM_ACTIVE: Final = 8
NUM_PANELS: Final = 16
HEADER_BYTES: Final = 32
COUNT: Final = 0
INPUT_ROW: Final = 8
INNER_ROW: Final = 16
FIRST_ROW: Final = 24
ENTRY_BYTES: Final = 32


@device
def entry_address(lists: int, expert: int) -> int:
    """The entry of an expert."""
    return lists + HEADER_BYTES + expert * ENTRY_BYTES


@device
def keep_largest(logits: int, num_experts: int, top_k: int, experts: int, values: int) -> None:
    """The `top_k` largest logits, falling, and their experts; of equal ones the first expert. Not-a-number may stay."""
    for expert in range(num_experts):
        value = load_f32(logits + 4 * expert)
        place = min(expert, top_k)
        if place == top_k:
            place -= 1
            if not value > load_f32(values + 4 * place):
                continue
        while place > 0 and value > load_f32(values + 4 * (place - 1)):
            store_f32(values + 4 * place, load_f32(values + 4 * (place - 1)))
            store_i32(experts + 4 * place, load_i32(experts + 4 * (place - 1)))
            place -= 1
        store_f32(values + 4 * place, value)
        store_i32(experts + 4 * place, expert)


@device
def sum_of_exponentials(values: int, count: int, largest: float) -> float:
    """Sum of e^(value - largest)."""
    total = broadcast(0.0)
    for first in range(0, count, LANES):
        number = min(LANES, count - first)
        power = exp(subtract(load_first(values + 4 * first, number), broadcast(largest)))
        total = add(total, keep_lanes(power, 0, number, 0.0))
    return reduce_add(total)


@kernel
def choose_experts(thread: int, num_threads: int, row: int) -> None:
    """The experts of each token and their shares: softmax over all logits. Items are tokens."""
    num_experts, top_k = argument(row, NUM_EXPERTS), argument(row, TOP_K)
    first, end = chunk_range(thread, num_threads, argument(row, COLUMN_NUM_TOKENS))
    for token in range(first, end):
        logits = argument(row, LOGITS) + token * argument(row, LOGITS_STRIDE)
        shares = argument(row, SHARES) + token * 4 * top_k
        keep_largest(logits, num_experts, top_k, argument(row, CHOSEN) + token * 4 * top_k, shares)
        largest = load_f32(shares)
        if argument(row, NORMALIZE) != 0:
            total = sum_of_exponentials(shares, top_k, largest)
        else:
            total = sum_of_exponentials(logits, num_experts, largest)
        for place in range(0, top_k, LANES):
            count = min(LANES, top_k - place)
            power = exp(subtract(load_first(shares + 4 * place, count), broadcast(largest)))
            store_first(shares + 4 * place, divide(power, broadcast(total)), count)


@kernel
def list_experts(thread: int, num_threads: int, row: int) -> None:
    """Sort the pairs by expert, those of one expert by token. One thread does it."""
    if thread != 0:
        return
    lists, num_experts, top_k = argument(row, LISTS), argument(row, NUM_EXPERTS), argument(row, TOP_K)
    chosen, num_tokens = argument(row, CHOSEN), argument(row, COLUMN_NUM_TOKENS)
    num_pairs = num_tokens * top_k
    for expert in range(num_experts):
        store_i64(entry_address(lists, expert) + COUNT, 0)
    for pair in range(num_pairs):
        count = entry_address(lists, load_i32(chosen + 4 * pair)) + COUNT
        store_i64(count, load_i64(count) + 1)
    first_row, inner_row, num_panels, num_active = 0, 0, 0, 0
    for expert in range(num_experts):
        entry = entry_address(lists, expert)
        count = load_i64(entry + COUNT)
        store_i64(entry + FIRST_ROW, first_row)
        store_i64(entry + INNER_ROW, inner_row)
        store_i64(entry + INPUT_ROW, 0 if num_tokens == 1 else inner_row)  # a single token is the input of all
        store_i64(entry + COUNT, 0)
        if count > 0:
            width = device_panel_width(count)
            panels = (count + width - 1) // width
            num_active += 1
            num_panels += panels
            first_row += count
            inner_row += panels * width
    store_i64(lists + NUM_PAIRS, num_pairs)
    store_i64(lists + NUM_ACTIVE, num_active)
    store_i64(lists + NUM_PANELS, num_panels)
    for pair in range(num_pairs):
        entry = entry_address(lists, load_i32(chosen + 4 * pair))
        count = load_i64(entry + COUNT)
        store_i64(entry + COUNT, count + 1)
        place = load_i64(entry + FIRST_ROW) + count
        store_i32(argument(row, TOKENS) + 4 * place, pair // top_k)
        store_i32(argument(row, ROWS) + 4 * pair, place)


def padded_pairs(num_pairs: int, num_experts: int) -> int:
    """Rows of whole panels that so many pairs take at the most, however they are spread over the experts."""
    return min(2 * num_pairs, num_pairs + (MAX_PANEL_WIDTH - 1) * num_experts)


@dataclass(frozen=True, slots=True)
class ExpertLists:
    """Where the lists of a step are.

    Args:
        address: of `num_bytes(...)` bytes, a multiple of 64.
        num_experts: E.
        top_k: k.
        max_tokens: of the largest step.
    """

    address: int
    num_experts: int
    top_k: int
    max_tokens: int

    @staticmethod
    def num_bytes(num_experts: int, top_k: int, max_tokens: int) -> int:
        """Of header, experts, and four numbers for each pair."""
        return HEADER_BYTES + num_experts * ENTRY_BYTES + 16 * top_k * max_tokens

    def part(self, index: int) -> int:
        """Address of the numbers of pairs: 0 chosen, 1 shares, 2 tokens, 3 rows."""
        first = self.address + HEADER_BYTES + self.num_experts * ENTRY_BYTES
        return first + 4 * index * self.top_k * self.max_tokens

    def arguments(self, logits: tuple[int, int], *, normalize: bool) -> tuple[int, ...]:
        """Columns of `choose_experts` and `list_experts`.

        Args:
            logits: address, and bytes from row to row, of float32 [T, E].
            normalize: whether a token's shares sum up to 1.

        Raises:
            InvalidParameterError: more experts are chosen than there are.
        """
        if not 1 <= self.top_k <= self.num_experts:
            raise InvalidParameterError(f"{self.top_k} of {self.num_experts} experts are chosen.", field="top_k")
        parts = (self.part(index) for index in range(4))
        return (self.address, self.num_experts, self.top_k, *parts, *logits, int(normalize))
