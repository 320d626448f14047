"""The experts' products and their sum: `gather_rows`, `expert_products` (gate and up, then down), `combine_experts`.

The products are those of the op `linear`: for its part of an expert's rows and output features a thread writes an op
row of its own, and calls the linear kernel with it as if it were alone. Every format, epilogue and variant of the
linear kernels is therefore one of experts, and a row's result is the same to the bit whoever computes it. An expert
that has one row uses the kernel for one token. See `expert_lists.py` for who goes where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tokenmill.errors import InvalidParameterError
from tokenmill.ops.cpu.activations import group_address, store_group
from tokenmill.ops.cpu.expert_lists import (
    COUNT,
    FIRST_ROW,
    INNER_ROW,
    INPUT_ROW,
    LISTS,
    NUM_ACTIVE,
    NUM_EXPERTS,
    NUM_PAIRS,
    NUM_PANELS,
    ExpertLists,
    entry_address,
)
from tokenmill.ops.cpu.intrinsics import argument, call_kernel, chunk_range, device_panel_width
from tokenmill.ops.cpu.jit import NativeFunction, device, kernel
from tokenmill.ops.cpu.layout import (
    COLUMN_NUM_TOKENS,
    FIRST_ARGUMENT,
    GROUP_BYTES,
    GROUP_SIZE,
    ROW_SIZE,
)
from tokenmill.ops.cpu.linear_epilogue import CHANNEL_SCALES, NUM_COLUMNS, OUTPUT
from tokenmill.ops.cpu.panels import TILE_STRIDE, clear_tile, store_panel_group, tile_memory
from tokenmill.ops.cpu.scalars import load_i64, store_i64
from tokenmill.ops.cpu.simd import (
    LANES,
    broadcast,
    fma,
    load,
    load_f32,
    load_first,
    load_i32,
    store_first,
)

ROW_BYTES: Final = 8 * ROW_SIZE

# Columns of `gather_rows`; LISTS and NUM_EXPERTS as in `expert_lists`.
GATHER_TOKENS: Final = FIRST_ARGUMENT + 2  # address of the token of each row
GATHER_X: Final = FIRST_ARGUMENT + 3
GATHER_X_STRIDE: Final = FIRST_ARGUMENT + 4
GATHER_COLUMNS: Final = FIRST_ARGUMENT + 5
GATHER_OUTPUT: Final = FIRST_ARGUMENT + 6
GATHER_GROUPS: Final = FIRST_ARGUMENT + 7  # groups of a row of int8_group32; 0: rows are float32

# Columns of `expert_products`.
TEMPLATE: Final = FIRST_ARGUMENT + 2  # address of the op row of the linear kernel, for the first expert
KERNEL_ONE: Final = FIRST_ARGUMENT + 3  # address of the linear kernel for one row
KERNEL_MANY: Final = FIRST_ARGUMENT + 4  # and for several
PARTS: Final = FIRST_ARGUMENT + 5  # address of an op row for each thread
INPUT_FIRST: Final = FIRST_ARGUMENT + 6  # where an expert's entry has the first row of its inputs
INPUT_BYTES: Final = FIRST_ARGUMENT + 7  # of a row of the inputs
OUTPUT_FIRST: Final = FIRST_ARGUMENT + 8
OUTPUT_BYTES: Final = FIRST_ARGUMENT + 9
OUTPUT_QUANTIZED: Final = FIRST_ARGUMENT + 10
EXPERT_BYTES: Final = FIRST_ARGUMENT + 11  # of an expert's weight
CHUNK_BYTES: Final = FIRST_ARGUMENT + 12  # of the weight of 32 output features, and their gates
CHUNK_BLOCKS: Final = FIRST_ARGUMENT + 13  # row blocks of these
NUM_CHUNKS: Final = FIRST_ARGUMENT + 14
INPUT_COLUMN: Final = FIRST_ARGUMENT + 15  # where the linear kernel's op row has what it reads
WEIGHT_COLUMN: Final = FIRST_ARGUMENT + 16
BLOCKS_COLUMN: Final = FIRST_ARGUMENT + 17
SCRATCH_COLUMN: Final = FIRST_ARGUMENT + 18
SCRATCH_BYTES: Final = FIRST_ARGUMENT + 19  # of the linear kernel's scratch memory, for each thread

# Columns of `combine_experts`.
COMBINE_ROWS: Final = FIRST_ARGUMENT
COMBINE_SHARES: Final = FIRST_ARGUMENT + 1
COMBINE_TOP_K: Final = FIRST_ARGUMENT + 2
COMBINE_X: Final = FIRST_ARGUMENT + 3
COMBINE_X_STRIDE: Final = FIRST_ARGUMENT + 4
COMBINE_OUTPUT: Final = FIRST_ARGUMENT + 5
COMBINE_OUTPUT_STRIDE: Final = FIRST_ARGUMENT + 6
COMBINE_COLUMNS: Final = FIRST_ARGUMENT + 7

WEIGHT_COST: Final = 4
"""What reading a weight costs, in rows that are multiplied with it: threads share experts of many and of few rows."""

COMBINE_CHUNK: Final = 256
"""Columns of a token that one thread adds up at a time."""


# ---- inputs ----------------------------------------------------------------------------------------------------------


@device
def gather_group(row: int, entry: int, panel: int, group: int, width: int, tile: int) -> None:
    """Quantize a group of a panel of an expert's rows."""
    num_groups, columns = argument(row, GATHER_GROUPS), argument(row, GATHER_COLUMNS)
    column = group * GROUP_SIZE
    number = min(GROUP_SIZE, columns - column)
    count = min(width, load_i64(entry + COUNT) - panel * width)
    if count < width or number < GROUP_SIZE:
        clear_tile(tile)
    tokens = argument(row, GATHER_TOKENS) + 4 * (load_i64(entry + FIRST_ROW) + panel * width)
    for lane in range(count):
        x = argument(row, GATHER_X) + load_i32(tokens + 4 * lane) * argument(row, GATHER_X_STRIDE) + 4 * column
        for offset in range(0, number, LANES):
            part = min(LANES, number - offset)
            store_first(tile + lane * TILE_STRIDE + 4 * offset, load_first(x + 4 * offset, part), part)
    buffer = argument(row, GATHER_OUTPUT) + load_i64(entry + INPUT_ROW) * num_groups * GROUP_BYTES
    record = group_address(buffer, num_groups, width, panel * width, group)
    if width == 1:
        store_group(record, width, 0, load(tile), load(tile + TILE_STRIDE // 2))
    else:
        store_panel_group(record, width, tile)


@device
def gather_row(row: int, entry: int, place: int) -> None:
    """Copy one of an expert's rows."""
    columns = argument(row, GATHER_COLUMNS)
    token = load_i32(argument(row, GATHER_TOKENS) + 4 * (load_i64(entry + FIRST_ROW) + place))
    x = argument(row, GATHER_X) + token * argument(row, GATHER_X_STRIDE)
    output = argument(row, GATHER_OUTPUT) + (load_i64(entry + INPUT_ROW) + place) * 4 * columns
    for column in range(0, columns, LANES):
        number = min(LANES, columns - column)
        store_first(output + 4 * column, load_first(x + 4 * column, number), number)


@kernel
def gather_rows(thread: int, num_threads: int, row: int) -> None:
    """The experts' inputs, one row for each pair, as float32 or quantized.

    Items are rows, or panels and their groups, of all experts; a single token is one row or panel, which all read.
    """
    lists, num_groups = argument(row, LISTS), argument(row, GATHER_GROUPS)
    total = load_i64(lists + NUM_PAIRS) if num_groups == 0 else load_i64(lists + NUM_PANELS) * num_groups
    if argument(row, COLUMN_NUM_TOKENS) == 1:
        total = max(num_groups, 1)
    tile = tile_memory()
    clear_tile(tile)
    first, end = chunk_range(thread, num_threads, total)
    for expert in range(argument(row, NUM_EXPERTS)):
        if end <= 0:
            break
        entry = entry_address(lists, expert)
        count = load_i64(entry + COUNT)
        width = device_panel_width(count)
        items = count if num_groups == 0 else (count + width - 1) // width * num_groups
        for item in range(max(first, 0), min(end, items)):
            if num_groups == 0:
                gather_row(row, entry, item)
            else:
                gather_group(row, entry, item // num_groups, item % num_groups, width, tile)
        first -= items
        end -= items


# ---- products --------------------------------------------------------------------------------------------------------


@device
def multiply_part(row: int, part: int, expert: int, entry: int, first_chunk: int, end_chunk: int) -> None:
    """Some chunks of output features of all rows of an expert: one call of the linear kernel."""
    template, count = argument(row, TEMPLATE), load_i64(entry + COUNT)
    weights = expert * argument(row, EXPERT_BYTES)
    inputs = load_i64(entry + argument(row, INPUT_FIRST)) * argument(row, INPUT_BYTES)
    output = load_i64(entry + argument(row, OUTPUT_FIRST)) * argument(row, OUTPUT_BYTES)
    if argument(row, OUTPUT_QUANTIZED) != 0:
        output += first_chunk * GROUP_BYTES * device_panel_width(count)
    else:
        output += first_chunk * 4 * GROUP_SIZE
    store_i64(part + 8 * COLUMN_NUM_TOKENS, count)
    column = argument(row, INPUT_COLUMN)
    store_i64(part + 8 * column, argument(template, column) + inputs)
    column = argument(row, WEIGHT_COLUMN)
    store_i64(part + 8 * column, argument(template, column) + weights + first_chunk * argument(row, CHUNK_BYTES))
    store_i64(part + 8 * argument(row, BLOCKS_COLUMN), (end_chunk - first_chunk) * argument(row, CHUNK_BLOCKS))
    store_i64(part + 8 * OUTPUT, argument(template, OUTPUT) + output)
    store_i64(part + 8 * NUM_COLUMNS, argument(template, NUM_COLUMNS) - first_chunk * GROUP_SIZE)
    scales = argument(template, CHANNEL_SCALES)
    if scales != 0:
        scales += weights + first_chunk * argument(row, CHUNK_BLOCKS) * 4 * LANES
        store_i64(part + 8 * CHANNEL_SCALES, scales)
    call_kernel(argument(row, KERNEL_ONE) if count == 1 else argument(row, KERNEL_MANY), 0, 1, part)


@kernel
def expert_products(thread: int, num_threads: int, row: int) -> None:
    """A linear op of each expert with its rows. Items are chunks of 32 output features of the experts that have rows;
    threads take as many as makes their rows, and the weights that they read, about the same."""
    lists, num_chunks = argument(row, LISTS), argument(row, NUM_CHUNKS)
    template, part = argument(row, TEMPLATE), argument(row, PARTS) + thread * ROW_BYTES
    for column in range(ROW_SIZE):
        store_i64(part + 8 * column, argument(template, column))
    column = argument(row, SCRATCH_COLUMN)
    store_i64(part + 8 * column, argument(template, column) + thread * argument(row, SCRATCH_BYTES))
    total = (load_i64(lists + NUM_PAIRS) + WEIGHT_COST * load_i64(lists + NUM_ACTIVE)) * num_chunks
    first, end = chunk_range(thread, num_threads, total)
    for expert in range(argument(row, NUM_EXPERTS)):
        if end <= 0:
            break
        entry = entry_address(lists, expert)
        count = load_i64(entry + COUNT)
        if count == 0:
            continue
        cost = count + WEIGHT_COST
        first_chunk = (max(first, 0) + cost - 1) // cost  # a chunk is of the thread in whose part it begins
        end_chunk = min((end + cost - 1) // cost, num_chunks)
        if first_chunk < end_chunk:
            multiply_part(row, part, expert, entry, first_chunk, end_chunk)
        first -= cost * num_chunks
        end -= cost * num_chunks


# ---- the sum ---------------------------------------------------------------------------------------------------------


@kernel
def combine_experts(thread: int, num_threads: int, row: int) -> None:
    """y[t] = sum of share * output over the token's experts, by falling share. Items: a token's 256 columns."""
    top_k, columns = argument(row, COMBINE_TOP_K), argument(row, COMBINE_COLUMNS)
    x, x_stride = argument(row, COMBINE_X), argument(row, COMBINE_X_STRIDE)
    chunks_per_token = (columns + COMBINE_CHUNK - 1) // COMBINE_CHUNK
    first, end = chunk_range(thread, num_threads, argument(row, COLUMN_NUM_TOKENS) * chunks_per_token)
    for chunk in range(first, end):
        token, begin = chunk // chunks_per_token, chunk % chunks_per_token * COMBINE_CHUNK
        rows = argument(row, COMBINE_ROWS) + token * 4 * top_k
        shares = argument(row, COMBINE_SHARES) + token * 4 * top_k
        output = argument(row, COMBINE_OUTPUT) + token * argument(row, COMBINE_OUTPUT_STRIDE)
        for column in range(begin, min(columns, begin + COMBINE_CHUNK), LANES):
            count = min(LANES, columns - column)
            total = broadcast(0.0)
            for place in range(0, 4 * top_k, 4):
                source = x + load_i32(rows + place) * x_stride + 4 * column
                total = fma(broadcast(load_f32(shares + place)), load_first(source, count), total)
            store_first(output + 4 * column, total, count)


# ---- rows of the op list ---------------------------------------------------------------------------------------------


def gather_arguments(
    lists: ExpertLists, *, x: tuple[int, int], columns: int, output: int, quantized: bool
) -> tuple[int, ...]:
    """Columns of a `gather_rows` op.

    Args:
        lists: who goes where.
        x: address, and bytes from row to row, of float32.
        columns: of a row.
        output: address of the rows: float32, or `int8_group32` panels.
        quantized: which.
    """
    groups = -(-columns // GROUP_SIZE) if quantized else 0
    return (lists.address, lists.num_experts, lists.part(2), *x, columns, output, groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertProducts:
    """What the row of an `expert_products` op says.

    Args:
        lists: who goes where.
        template: address of `ROW_BYTES` bytes: the op row of `linear` for the first expert (`op_row`).
        kernels: of `linear` for one row and for several; the same one if it does not matter.
        parts: address of `ROW_BYTES` bytes for each thread.
        expert_bytes: of one expert's packed weight.
        num_blocks: row blocks of it.
        gated: whether gate and up alternate there.
        block_bytes: of a row block.
        reads_inner: whether the inputs are the inner values (for `down`), or x (for `gate_up`).
        input_bytes: of a row of the inputs.
        output_bytes: of a row of the output.
        output_quantized: whether it is `int8_group32`.
        columns: where the op row has the address of the inputs, that of the weight, the number of row blocks and the
            address of the scratch memory.
        scratch_bytes: of that, for each thread.
    """

    lists: ExpertLists
    template: int
    kernels: tuple[NativeFunction, NativeFunction]
    parts: int
    expert_bytes: int
    num_blocks: int
    gated: bool
    block_bytes: int
    reads_inner: bool
    input_bytes: int
    output_bytes: int
    output_quantized: bool
    columns: tuple[int, int, int, int]
    scratch_bytes: int

    def arguments(self) -> tuple[int | NativeFunction, ...]:
        """The row from `FIRST_ARGUMENT` on; the kernels stand for their addresses.

        Raises:
            InvalidParameterError: the weight is not whole chunks.
        """
        chunk_blocks = 4 if self.gated else 2
        if self.num_blocks % chunk_blocks:
            raise InvalidParameterError(f"{self.num_blocks} row blocks are not padded.", field="num_blocks")
        return (
            self.lists.address,
            self.lists.num_experts,
            self.template,
            *self.kernels,
            self.parts,
            INNER_ROW if self.reads_inner else INPUT_ROW,
            self.input_bytes,
            FIRST_ROW if self.reads_inner else INNER_ROW,
            self.output_bytes,
            int(self.output_quantized),
            self.expert_bytes,
            chunk_blocks * self.block_bytes,
            chunk_blocks,
            self.num_blocks // chunk_blocks,
            *self.columns,
            self.scratch_bytes,
        )


def op_row(arguments: Sequence[int]) -> list[int]:
    """A whole op row of `ROW_SIZE` numbers with these arguments, for `ExpertProducts.template`."""
    assert len(arguments) <= ROW_SIZE - FIRST_ARGUMENT, len(arguments)
    return [0] * FIRST_ARGUMENT + [*arguments] + [0] * (ROW_SIZE - FIRST_ARGUMENT - len(arguments))


def combine_arguments(
    lists: ExpertLists, *, x: tuple[int, int], output: tuple[int, int], columns: int
) -> tuple[int, ...]:
    """Columns of a `combine_experts` op.

    Args:
        lists: who went where.
        x: address, and bytes from row to row, of the experts' outputs, float32 in the order of the lists.
        output: likewise, one row for each token.
        columns: of both.
    """
    return (lists.part(3), lists.part(1), lists.top_k, *x, *output, columns)
