"""The op `embedding`: rows of a table in any weight format, as rows or as packed for a linear kernel (tied weights)."""

from __future__ import annotations

from typing import Final

from tokenmill.errors import UnsupportedFeatureError
from tokenmill.ops.cpu.intrinsics import argument, chunk_range, float_argument
from tokenmill.ops.cpu.jit import device, float_bits, kernel
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS, FIRST_ARGUMENT, GROUP_SIZE
from tokenmill.ops.cpu.packing import ENCODINGS, FORMATS, NIBBLE, ROW_BLOCK, padded_rows
from tokenmill.ops.cpu.scalars import bfloat16_value, load_f16, load_i8, load_u8, load_u16
from tokenmill.ops.cpu.simd import float32, load_f32, load_i32, store_f32

TOKEN_IDS: Final = FIRST_ARGUMENT
TABLE: Final = FIRST_ARGUMENT + 1
OUTPUT: Final = FIRST_ARGUMENT + 2
OUTPUT_STRIDE: Final = FIRST_ARGUMENT + 3
COLUMNS: Final = FIRST_ARGUMENT + 4
FORMAT: Final = FIRST_ARGUMENT + 5  # index in TABLE_FORMATS
IS_PACKED: Final = FIRST_ARGUMENT + 6
PADDED_ROWS: Final = FIRST_ARGUMENT + 7  # of a packed table
SCALE: Final = FIRST_ARGUMENT + 8

TABLE_FORMATS: Final = (*FORMATS, "float32", "bfloat16")
Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = (TABLE_FORMATS.index(name) for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"))
Q2_K, Q3_K, Q4_K, Q5_K = (TABLE_FORMATS.index(f"q{bits}_k") for bits in (2, 3, 4, 5))
INT8_GROUP32, INT8_CHANNEL, FLOAT32, BFLOAT16 = (
    TABLE_FORMATS.index(name) for name in ("int8_group32", "int8_channel", "float32", "bfloat16")
)
BLOCK_COLUMNS: Final = tuple(encoding.block_columns for encoding in ENCODINGS)
BLOCK_BYTES: Final = tuple(encoding.block_bytes for encoding in ENCODINGS)

# Of `packing.ENCODINGS`, by the number of the format.
BITS: Final = tuple(encoding.bits for encoding in ENCODINGS)
SCALE_BYTES: Final = tuple(encoding.scale_bytes for encoding in ENCODINGS)
ZERO_POINTS: Final = tuple(encoding.zero_point for encoding in ENCODINGS)
HAS_MINIMUM: Final = tuple(int(encoding.has_minimum) for encoding in ENCODINGS)
SCALES_PER_GROUP: Final = tuple(encoding.scales_per_group for encoding in ENCODINGS)
VALUES_OFFSET: Final = tuple(encoding.values_offset for encoding in ENCODINGS)
GROUP_BYTES: Final = tuple(encoding.group_bytes for encoding in ENCODINGS)

HALF_GROUP: Final = GROUP_SIZE // 2
K_GROUPS: Final = 8
"""Groups of 32 in a block of 256 columns."""

SIX_BITS: Final = 63


@device
def row_value(weight_format: int, place: int, group: int, column: int) -> float:
    """The value of a column (0 to 31) of a group of a row at `place`; the row is not packed."""
    if weight_format == FLOAT32:
        return load_f32(place + 4 * (group * GROUP_SIZE + column))
    if weight_format == BFLOAT16:
        return bfloat16_value(load_u16(place + 2 * (group * GROUP_SIZE + column)))
    if weight_format == INT8_CHANNEL:
        return load_f32(place) * float32(load_i8(place + 4 + group * GROUP_SIZE + column))
    if weight_format == INT8_GROUP32:
        block = place + group * 34
        return load_f16(block) * float32(load_i8(block + 2 + column))
    if weight_format == Q8_0:
        block = place + group * 34
        return load_f16(block) * float32(load_i8(block + 2 + column))
    if BLOCK_COLUMNS[weight_format] > GROUP_SIZE:
        block = place + group // K_GROUPS * BLOCK_BYTES[weight_format]
        return k_block_value(weight_format, block, group % K_GROUPS, column)
    shift = 4 if column >= HALF_GROUP else 0
    byte = column % HALF_GROUP
    if weight_format == Q4_0:
        block = place + group * 18
        return load_f16(block) * float32((load_u8(block + 2 + byte) >> shift & NIBBLE) - 8)
    if weight_format == Q4_1:
        block = place + group * 20
        value = load_u8(block + 4 + byte) >> shift & NIBBLE
        return load_f16(block) * float32(value) + load_f16(block + 2)
    if weight_format == Q5_1:
        block = place + group * 24
        fifth = load_u8(block + 4 + column // 8) >> column % 8 & 1
        value = load_u8(block + 8 + byte) >> shift & NIBBLE | fifth << 4
        return load_f16(block) * float32(value) + load_f16(block + 2)
    block = place + group * 22
    fifth = load_u8(block + 2 + column // 8) >> column % 8 & 1
    value = load_u8(block + 6 + byte) >> shift & NIBBLE | fifth << 4
    return load_f16(block) * float32(value - 16)


@device
def k_block_value(weight_format: int, block: int, group: int, column: int) -> float:
    """Of a block of 256 columns: 8 groups."""
    if weight_format == Q2_K:
        return q2_k_value(block, group, column)
    if weight_format == Q3_K:
        return q3_k_value(block, group, column)
    if weight_format in (Q4_K, Q5_K):
        return q4_k_value(weight_format, block, group, column)
    return q6_k_value(block, group, column)


@device
def q2_k_value(block: int, group: int, column: int) -> float:
    """Of a block with 16 scales and minimums of 4 bits, for 16 columns each."""
    value = load_u8(block + 16 + group // 4 * GROUP_SIZE + column) >> group % 4 * 2 & 3
    mixed = load_u8(block + 2 * group + column // HALF_GROUP)
    scale = load_f16(block + 80) * float32(mixed & NIBBLE)
    return scale * float32(value) - load_f16(block + 82) * float32(mixed >> 4)


@device
def q3_k_value(block: int, group: int, column: int) -> float:
    """Of a block with 16 scales of 6 bits, for 16 columns each."""
    low = load_u8(block + GROUP_SIZE + group // 4 * GROUP_SIZE + column) >> group % 4 * 2 & 3
    value = low | (load_u8(block + column) >> group & 1) << 2
    index = 2 * group + column // HALF_GROUP
    nibble = load_u8(block + 96 + index % 8) >> index // 8 * 4 & NIBBLE
    scale = nibble | (load_u8(block + 104 + index % 4) >> index // 4 * 2 & 3) << 4
    return load_f16(block + 108) * float32(scale - 32) * float32(value - 4)


@device
def q4_k_value(weight_format: int, block: int, group: int, column: int) -> float:
    """Of a block of q4_k or q5_k: 8 groups with scales and minimums of 6 bits."""
    scales = block + 4
    if group < 4:
        scale, minimum = load_u8(scales + group) & SIX_BITS, load_u8(scales + 4 + group) & SIX_BITS
    else:
        mixed = load_u8(scales + 4 + group)
        scale = mixed & NIBBLE | load_u8(scales + group - 4) >> 6 << 4
        minimum = mixed >> 4 | load_u8(scales + group) >> 6 << 4
    nibbles, fifth = block + 16, 0
    if weight_format == Q5_K:
        nibbles, fifth = block + 48, load_u8(block + 16 + column) >> group & 1
    value = load_u8(nibbles + group // 2 * GROUP_SIZE + column) >> group % 2 * 4 & NIBBLE | fifth << 4
    return load_f16(block) * float32(scale) * float32(value) - load_f16(block + 2) * float32(minimum)


@device
def q6_k_value(block: int, group: int, column: int) -> float:
    """Of a block of 256: 16 scales of 8 bits, for 16 columns each."""
    half, quarter = group // 4, group % 4
    low = load_u8(block + half * 64 + quarter % 2 * GROUP_SIZE + column) >> quarter // 2 * 4 & NIBBLE
    high = load_u8(block + 128 + half * GROUP_SIZE + column) >> 2 * quarter & 3
    scale = load_f16(block + 208) * float32(load_i8(block + 192 + 2 * group + column // HALF_GROUP))
    return scale * float32((low | high << 4) - 32)


@device
def packed_scale(weight_format: int, place: int, index: int, lane: int) -> float:
    """The index-th number (scales, then minimums) of a row in a packed group."""
    if SCALE_BYTES[weight_format] == 2:
        return load_f16(place + 2 * (index * ROW_BLOCK + lane))
    return load_f32(place + 4 * (index * ROW_BLOCK + lane))


@device
def packed_value(row: int, weight_format: int, table_row: int, group: int, column: int) -> float:
    """The value of a column (0 to 31) of a group of a row; see `packing.py` and `linear_float.py`."""
    table, columns = argument(row, TABLE), argument(row, COLUMNS)
    block, lane = table_row // ROW_BLOCK, table_row % ROW_BLOCK
    if weight_format == FLOAT32:
        return load_f32(table + 4 * ((block * columns + group * GROUP_SIZE + column) * ROW_BLOCK + lane))
    if weight_format == BFLOAT16:
        pair = (block * columns + group * GROUP_SIZE + column) // 2 * ROW_BLOCK + lane
        return bfloat16_value(load_u16(table + 4 * pair + 2 * (column % 2)))
    num_groups = (columns + GROUP_SIZE - 1) // GROUP_SIZE
    group_bytes = GROUP_BYTES[weight_format]
    place = table + (block * num_groups + group) * group_bytes
    values = place + VALUES_OFFSET[weight_format]
    word = lane * 4 + column % 4  # byte in a vector of 16 rows
    if BITS[weight_format] == 8:
        value = load_u8(values + column // 4 * 64 + word)
    else:
        value = load_u8(values + column % HALF_GROUP // 4 * 64 + word) >> column // HALF_GROUP * 4 & NIBBLE
    high_bits = values + HALF_GROUP // 4 * 64
    if BITS[weight_format] == 5:
        value |= (load_u8(high_bits + word) >> column // 4 & 1) << 4
    elif BITS[weight_format] == 6:
        value |= (load_u8(high_bits + column // HALF_GROUP * 64 + word) >> column % HALF_GROUP // 4 * 2 & 3) << 4
    number = float32(value - ZERO_POINTS[weight_format])
    if SCALE_BYTES[weight_format] == 0:
        scales = table + argument(row, PADDED_ROWS) // ROW_BLOCK * num_groups * group_bytes
        return number * load_f32(scales + 4 * table_row)
    scales_per_group = SCALES_PER_GROUP[weight_format]
    index = column * scales_per_group // GROUP_SIZE
    result = number * packed_scale(weight_format, place, index, lane)
    if HAS_MINIMUM[weight_format] != 0:
        result += packed_scale(weight_format, place, scales_per_group + index, lane)
    return result


@device
def row_bytes(weight_format: int, columns: int) -> int:
    """Bytes of a row that is not packed."""
    num_groups = (columns + GROUP_SIZE - 1) // GROUP_SIZE
    if weight_format == FLOAT32:
        return 4 * columns
    if weight_format == BFLOAT16:
        return 2 * columns
    if weight_format == INT8_CHANNEL:
        return 4 + columns
    if weight_format == INT8_GROUP32:
        return 34 * num_groups
    return columns // BLOCK_COLUMNS[weight_format] * BLOCK_BYTES[weight_format]


@kernel
def embedding(thread: int, num_threads: int, row: int) -> None:
    """y[t] = table[token_ids[t]] * scale; items: token and group of 32 columns."""
    columns, weight_format = argument(row, COLUMNS), argument(row, FORMAT)
    scale = float_argument(row, SCALE)
    num_groups = (columns + GROUP_SIZE - 1) // GROUP_SIZE
    first, end = chunk_range(thread, num_threads, argument(row, COLUMN_NUM_TOKENS) * num_groups)
    for item in range(first, end):
        token, group = item // num_groups, item % num_groups
        table_row = load_i32(argument(row, TOKEN_IDS) + 4 * token)
        output = argument(row, OUTPUT) + token * argument(row, OUTPUT_STRIDE) + 4 * GROUP_SIZE * group
        place = argument(row, TABLE) + table_row * row_bytes(weight_format, columns)
        for column in range(min(GROUP_SIZE, columns - group * GROUP_SIZE)):
            if argument(row, IS_PACKED) != 0:
                value = packed_value(row, weight_format, table_row, group, column)
            else:
                value = row_value(weight_format, place, group, column)
            store_f32(output + 4 * column, value * scale)


def embedding_arguments(
    *,
    token_ids: int,
    table: int,
    table_format: str,
    num_rows: int,
    columns: int,
    output: tuple[int, int],
    packed: bool = False,
    scale: float = 1.0,
) -> tuple[int, ...]:
    """Columns of an `embedding` op.

    Args:
        token_ids: address of int32 [T].
        table: address of the table.
        table_format: one of `TABLE_FORMATS`.
        num_rows, columns: of the table.
        output: address, and bytes from row to row, of float32 [T, columns].
        packed: the table is a packed weight (`packing.py`, `linear_float.py`), not gated; else rows of its format.
        scale: on every value.

    Raises:
        UnsupportedFeatureError: no such format.
    """
    if table_format not in TABLE_FORMATS:
        raise UnsupportedFeatureError(
            f"The CPU kernels cannot look rows up in a table of format {table_format!r}.",
            field="format",
            remedy=f"Convert it to one of {', '.join(TABLE_FORMATS)}.",
        )
    number = TABLE_FORMATS.index(table_format)
    return (
        token_ids,
        table,
        *output,
        columns,
        number,
        int(packed),
        padded_rows(num_rows),
        float_bits(scale),
    )
