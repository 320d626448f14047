"""Packs linear weights for the int8 kernels: from the blocks of a GGUF file as they are, or from float tensors.

A packed weight is row blocks of 16 rows, one after the other; a row block is its groups of 32 columns, one after the
other, so that a thread reads one sequential stream. The bytes of one group of a row block:

| part | content |
|---|---|
| scales | 16 rows of float16 or float32; two such vectors for q2_k, q3_k and q6_k (columns 0-15 and 16-31) |
| minimums | as many vectors of the same type, for q4_1, q5_1, q2_k, q4_k and q5_k |
| values of 8 bits | 8 vectors of 64 bytes: byte 4 r + j of vector i is row r, column 4 i + j, unsigned |
| values of 4 bits | 4 such vectors: column 4 i + j in the low, 16 + 4 i + j in the high half of the byte |
| values of 5 bits | as for 4 bits, then one vector: bit i of byte 4 r + j is the fifth bit of column 4 i + j |
| values of 6 bits | as for 4 bits, then two vectors: bits 2 i of vector h are the high bits of column 16 h + 4 i + j |

Values of 2 and 3 bits are packed as 4. A weight is scale * (value - zero point), or scale * value + minimum.
int8_channel has no scales there but one float32 per row behind all row blocks. Rows are padded to a multiple of 32 with
zeros; in a gated weight blocks of 16 gate rows and 16 up rows alternate (both padded to 32), so that one thread has
both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from tokenmill.errors import CheckpointError, InvalidParameterError, UnsupportedFeatureError
from tokenmill.ops.cpu.layout import GROUP_SIZE

ByteArray: TypeAlias = npt.NDArray[np.uint8]
FloatArray: TypeAlias = npt.NDArray[np.float32]

ROW_BLOCK: Final = 16
ROW_PADDING: Final = 32
ONE: Final = np.uint8(1)
THREE: Final = np.uint8(3)
NIBBLE: Final = np.uint8(15)
K_BLOCK: Final = 256
"""Columns of a block of q2_k to q6_k."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How one format's groups are packed.

    Args:
        format: name of the format in a program.
        bits: of a value: 4, 5, 6 or 8.
        scale_bytes: 2 (float16), 4 (float32), or 0 (one scale per row).
        zero_point: subtracted from values; 0 if there is a minimum.
        has_minimum: whether each group has one to be added.
        scales_per_group: 1, or 2 for halves of 16 columns.
        block_columns, block_bytes: of the file's blocks; 0 for formats that no file has.
    """

    format: str
    bits: int
    scale_bytes: int
    zero_point: int = 0
    has_minimum: bool = False
    scales_per_group: int = 1
    block_columns: int = 0
    block_bytes: int = 0

    @property
    def values_offset(self) -> int:
        """Bytes of scales and minimums before the values of a group."""
        return ROW_BLOCK * self.scale_bytes * self.scales_per_group * (2 if self.has_minimum else 1)

    @property
    def group_bytes(self) -> int:
        """Bytes of a group of a row block."""
        return self.values_offset + ROW_BLOCK * GROUP_SIZE * self.bits // 8


ENCODINGS: Final = (
    Encoding("q4_0", 4, 2, zero_point=8, block_columns=32, block_bytes=18),
    Encoding("q4_1", 4, 2, has_minimum=True, block_columns=32, block_bytes=20),
    Encoding("q5_0", 5, 2, zero_point=16, block_columns=32, block_bytes=22),
    Encoding("q8_0", 8, 2, zero_point=128, block_columns=32, block_bytes=34),
    Encoding("q4_k", 4, 4, has_minimum=True, block_columns=K_BLOCK, block_bytes=144),
    Encoding("q6_k", 6, 4, zero_point=32, scales_per_group=2, block_columns=K_BLOCK, block_bytes=210),
    Encoding("int8_group32", 8, 2, zero_point=128),
    Encoding("int8_channel", 8, 0, zero_point=128),
    Encoding("q5_1", 5, 2, has_minimum=True, block_columns=32, block_bytes=24),
    Encoding("q5_k", 5, 4, has_minimum=True, block_columns=K_BLOCK, block_bytes=176),
    Encoding("q3_k", 4, 4, zero_point=4, scales_per_group=2, block_columns=K_BLOCK, block_bytes=110),
    Encoding("q2_k", 4, 4, has_minimum=True, scales_per_group=2, block_columns=K_BLOCK, block_bytes=84),
)
"""Formats that the int8 linear kernels read; kernels are told the index."""

FORMATS: Final = tuple(encoding.format for encoding in ENCODINGS)


def encoding_of(weight_format: str) -> Encoding:
    """The encoding of a format.

    Raises:
        UnsupportedFeatureError: the int8 kernels do not read it.
    """
    if weight_format not in FORMATS:
        raise UnsupportedFeatureError(
            f"The int8 linear kernels do not read weights of format {weight_format!r}.",
            field="format",
            remedy=f"Convert the weight to one of {', '.join(FORMATS)}.",
        )
    return ENCODINGS[FORMATS.index(weight_format)]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [num_rows, num_columns] that the int8 linear kernels read.

    Args:
        data: `packed_bytes(...)` bytes, contiguous; may be stored and read back.
        format: one of `FORMATS`.
        num_rows: output features; of gate and up together if gated.
        num_columns: input features.
        gated: the first half of the rows is a gate for the second half, and they are interleaved.
    """

    data: ByteArray
    format: str
    num_rows: int
    num_columns: int
    gated: bool = False

    def __post_init__(self) -> None:
        expected = packed_bytes(self.format, self.num_rows, self.num_columns, gated=self.gated)
        if self.data.dtype != np.uint8 or self.data.shape != (expected,) or not self.data.flags.c_contiguous:
            raise InvalidParameterError(
                f"Packed data of {self.data.shape} {self.data.dtype}, not ({expected},) uint8.", field="data"
            )


def padded_rows(num_rows: int, *, gated: bool = False) -> int:
    """Rows of the packed weight."""
    if gated:
        return 2 * padded_rows(num_rows // 2)
    return -(-num_rows // ROW_PADDING) * ROW_PADDING


def num_groups(num_columns: int) -> int:
    """Groups of 32 columns, the last of which may be padded."""
    return -(-num_columns // GROUP_SIZE)


def packed_bytes(weight_format: str, num_rows: int, num_columns: int, *, gated: bool = False) -> int:
    """Size of a packed weight.

    Raises:
        UnsupportedFeatureError: the int8 kernels do not read the format.
    """
    encoding = encoding_of(weight_format)
    rows = padded_rows(num_rows, gated=gated)
    channel_scales = 4 * rows if encoding.scale_bytes == 0 else 0
    return rows // ROW_BLOCK * num_groups(num_columns) * encoding.group_bytes + channel_scales


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a weight, taken apart.

    Args:
        words: uint32 [rows, groups, vectors], values as they are packed.
        scales: float [rows, groups, 1 or 2], or [rows] for int8_channel.
        minimums: likewise, or None.
    """

    words: npt.NDArray[np.uint32]
    scales: npt.NDArray[np.floating]
    minimums: npt.NDArray[np.floating] | None = None


def pack_blocks(
    weight_format: str,
    parts: Sequence[ByteArray],
    num_columns: int,
    *,
    row_order: Sequence[npt.NDArray[np.intp] | None] | None = None,
    gated: bool = False,
) -> PackedWeight:
    """Pack tensors of one GGUF block type, as one weight with their rows one after the other. No value changes.

    Args:
        weight_format: one of `BLOCK_READERS`.
        parts: each tensor's blocks, uint8 [rows, bytes of a row].
        num_columns: input features.
        row_order: for each part, row i of the weight is row `row_order[i]` of the tensor; None where rows stay.
        gated: `parts` are gate and up, of the same shape.

    Raises:
        InvalidParameterError: a part's shape does not fit the format or `num_columns`.
        UnsupportedFeatureError: the format is not one of blocks.
    """
    encoding = encoding_of(weight_format)
    if encoding.block_columns == 0:
        raise UnsupportedFeatureError(f"{weight_format} is not a block format.", field="format")
    if num_columns % encoding.block_columns:
        raise InvalidParameterError(
            f"{weight_format} has blocks of {encoding.block_columns} columns; {num_columns} is not a multiple.",
            field="num_columns",
        )
    row_bytes = num_columns // encoding.block_columns * encoding.block_bytes
    taken = []
    for index, part in enumerate(parts):
        if part.ndim != 2 or part.shape[1] != row_bytes or part.dtype != np.uint8:
            raise InvalidParameterError(
                f"Part {index} is {part.dtype} {part.shape}; {num_columns} columns of {weight_format} are "
                f"[rows, {row_bytes}] uint8.",
                field="parts",
            )
        order = None if row_order is None else row_order[index]
        blocks = np.ascontiguousarray(part if order is None else part[order])
        taken.append(BLOCK_READERS[weight_format](blocks.reshape(len(part), -1, encoding.block_bytes)))
    return assemble(encoding, taken, num_columns, gated=gated)


def pack_floats(weight_format: str, parts: Sequence[FloatArray], *, gated: bool = False) -> PackedWeight:
    """Quantize float tensors [rows, columns] to int8_group32 or int8_channel and pack them as one weight.

    Raises:
        CheckpointError: a weight is not finite, or too large for its scale.
        InvalidParameterError: shapes differ.
        UnsupportedFeatureError: another format.
    """
    encoding = encoding_of(weight_format)
    if weight_format not in ("int8_group32", "int8_channel"):
        raise UnsupportedFeatureError(f"Float weights cannot be packed as {weight_format}.", field="format")
    columns = {part.shape[1] for part in parts}
    if len(columns) != 1:
        raise InvalidParameterError(f"Parts have {sorted(columns)} columns.", field="parts")
    num_columns = columns.pop()
    quantize = quantize_groups if weight_format == "int8_group32" else quantize_channels
    return assemble(encoding, [quantize(part) for part in parts], num_columns, gated=gated)


def assemble(encoding: Encoding, parts: Sequence[Rows], num_columns: int, *, gated: bool) -> PackedWeight:
    """Lay rows out as row blocks."""
    counts = [len(part.words) for part in parts]
    if gated and (len(counts) != 2 or counts[0] != counts[1]):
        raise InvalidParameterError(f"A gated weight has parts of {counts} rows, not gate and up.", field="parts")
    rows = padded_rows(sum(counts), gated=gated)
    groups = num_groups(num_columns)
    size = packed_bytes(encoding.format, sum(counts), num_columns, gated=gated)
    data: ByteArray = np.zeros(size, np.uint8)
    num_blocks = rows // ROW_BLOCK
    records = data[: num_blocks * groups * encoding.group_bytes].reshape(num_blocks, groups, encoding.group_bytes)
    channels = data[records.size :].view(np.float32).reshape(-1, ROW_BLOCK)
    if gated:
        for index, part in enumerate(parts):
            _write_rows(encoding, part, records[index::2], channels[index::2])
    else:
        _write_rows(encoding, _concatenate(parts), records, channels)
    return PackedWeight(data, encoding.format, sum(counts), num_columns, gated)


def _write_rows(encoding: Encoding, rows: Rows, records: ByteArray, channels: FloatArray) -> None:
    """Transpose rows into the records [row blocks, groups, bytes]; whole blocks at once, then the rest."""
    whole = len(rows.words) // ROW_BLOCK
    rest = len(rows.words) - whole * ROW_BLOCK
    for first, count, size in ((0, whole, ROW_BLOCK), (whole, int(rest > 0), rest)):
        if count == 0:
            continue
        begin, end = first * ROW_BLOCK, first * ROW_BLOCK + count * size
        target = records[first : first + count]
        groups = target.shape[1]
        values = target[:, :, encoding.values_offset :].view(np.uint32).reshape(count, groups, -1, ROW_BLOCK)
        values[..., :size] = rows.words[begin:end].reshape(count, size, groups, -1).transpose(0, 2, 3, 1)
        if encoding.scale_bytes == 0:
            channels[first : first + count, :size] = rows.scales[begin:end].reshape(count, size)
            continue
        kind = np.float16 if encoding.scale_bytes == 2 else np.float32
        floats = target[:, :, : encoding.values_offset].view(kind).reshape(count, groups, -1, ROW_BLOCK)
        for index, source in enumerate((rows.scales, rows.minimums)):
            if source is not None:
                number = encoding.scales_per_group
                place = floats[:, :, index * number : (index + 1) * number, :size]
                place[...] = source[begin:end].reshape(count, size, groups, number).transpose(0, 2, 3, 1)


def _concatenate(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    minimums = [part.minimums for part in parts if part.minimums is not None]
    return Rows(
        np.concatenate([part.words for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(minimums) if minimums else None,
    )


def byte_words(values: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint32]:
    """Unsigned values [rows, groups, 32] as words of 8-bit encodings."""
    return np.ascontiguousarray(values).view(np.uint32)


def nibble_words(values: ByteArray) -> npt.NDArray[np.uint32]:
    """Unsigned values [rows, groups, 32] below 16 as words of 4-bit encodings."""
    half = GROUP_SIZE // 2
    return byte_words(values[..., :half] | (values[..., half:] << 4))


def split_words(values: ByteArray, bits: int) -> npt.NDArray[np.uint32]:
    """Unsigned values [rows, groups, 32] of 5 or 6 bits as words of their encodings."""
    width = bits - 4
    steps = (values >> 4).reshape(*values.shape[:2], width, -1, 4)  # [vector, steps of a byte, column % 4]
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(-1, 1)
    high = np.bitwise_or.reduce(steps << shifts, axis=-2).reshape(*values.shape[:2], 4 * width)
    return np.concatenate([nibble_words(values & NIBBLE), byte_words(high)], axis=-1)


def _read_q4_0(blocks: ByteArray) -> Rows:
    return Rows(byte_words(blocks[..., 2:]), _halves(blocks, 0, 1))


def _read_q4_1(blocks: ByteArray) -> Rows:
    return Rows(byte_words(blocks[..., 4:]), _halves(blocks, 0, 1), _halves(blocks, 1, 1))


def _read_q5_0(blocks: ByteArray) -> Rows:
    high = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
    low = blocks[..., 6:]
    values = np.concatenate([low & NIBBLE, low >> 4], axis=-1) | (high << 4)
    return Rows(split_words(values, 5), _halves(blocks, 0, 1))


def _read_q8_0(blocks: ByteArray) -> Rows:
    return Rows(byte_words(blocks[..., 2:] ^ 128), _halves(blocks, 0, 1))


def _read_q5_1(blocks: ByteArray) -> Rows:
    values = np.concatenate([blocks[..., 8:] & NIBBLE, blocks[..., 8:] >> 4], axis=-1)
    high = np.unpackbits(blocks[..., 4:8], axis=-1, bitorder="little")
    return Rows(split_words(values | (high << 4), 5), _halves(blocks, 0, 1), _halves(blocks, 1, 1))


def _k_scales(blocks: ByteArray) -> tuple[FloatArray, FloatArray]:
    """Scales and minimums of the 8 groups of q4_k and q5_k blocks, [rows, groups, 1]."""
    rows, packed = len(blocks), blocks[..., 4:16]
    scales = np.concatenate([packed[..., :4] & 63, (packed[..., 8:] & NIBBLE) | (packed[..., :4] >> 6 << 4)], axis=-1)
    minimums = np.concatenate([packed[..., 4:8] & 63, (packed[..., 8:] >> 4) | (packed[..., 4:8] >> 6 << 4)], axis=-1)
    step = _halves(blocks, 0, 1).astype(np.float32) * scales
    shift = _halves(blocks, 1, 1).astype(np.float32) * minimums
    return step.reshape(rows, -1, 1), -shift.reshape(rows, -1, 1)


def _k_nibbles(low: ByteArray) -> ByteArray:
    """Low halves of bytes [rows, blocks, 128], 32 of them, then their high halves: [rows, blocks, 8, 32]."""
    parts = low.reshape(*low.shape[:2], 4, GROUP_SIZE)
    return np.stack([parts & NIBBLE, parts >> 4], axis=3).reshape(*low.shape[:2], 8, GROUP_SIZE)


def _read_q4_k(blocks: ByteArray) -> Rows:
    values = _k_nibbles(blocks[..., 16:]).reshape(len(blocks), -1, GROUP_SIZE)
    return Rows(nibble_words(values), *_k_scales(blocks))


def _read_q5_k(blocks: ByteArray) -> Rows:
    high: ByteArray = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(8, 1) & ONE
    values: ByteArray = _k_nibbles(blocks[..., 48:]) | (high << np.uint8(4))
    return Rows(split_words(values.reshape(len(blocks), -1, GROUP_SIZE), 5), *_k_scales(blocks))


def _k_pairs(low: ByteArray) -> ByteArray:
    """Pairs of bits of bytes [rows, blocks, 64], the lowest of 32 bytes first: [rows, blocks, 8, 32]."""
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    pairs: ByteArray = low.reshape(*low.shape[:2], 2, 1, GROUP_SIZE) >> shifts & THREE
    return pairs.reshape(*low.shape[:2], 8, GROUP_SIZE)


def _read_q3_k(blocks: ByteArray) -> Rows:
    rows = len(blocks)
    high: ByteArray = blocks[..., None, :32] >> np.arange(8, dtype=np.uint8).reshape(8, 1) & ONE
    values: ByteArray = _k_pairs(blocks[..., 32:96]) | (high << np.uint8(2))
    low, rest = blocks[..., None, 96:104], blocks[..., None, 104:108]
    nibbles = (low >> np.array([[0], [4]], np.uint8) & NIBBLE).reshape(rows, -1, 16)
    pairs = (rest >> np.array([[0], [2], [4], [6]], np.uint8) & THREE).reshape(rows, -1, 16)
    scales = (nibbles | (pairs << 4)).astype(np.float32) - 32
    steps = _halves(blocks, 54, 1).astype(np.float32) * scales
    return Rows(nibble_words(values.reshape(rows, -1, GROUP_SIZE)), steps.reshape(rows, -1, 2))


def _read_q2_k(blocks: ByteArray) -> Rows:
    rows, mixed = len(blocks), blocks[..., :16]
    steps = _halves(blocks, 40, 1).astype(np.float32) * (mixed & NIBBLE)
    shifts = _halves(blocks, 41, 1).astype(np.float32) * (mixed >> 4)
    values = _k_pairs(blocks[..., 16:80]).reshape(rows, -1, GROUP_SIZE)
    return Rows(nibble_words(values), steps.reshape(rows, -1, 2), -shifts.reshape(rows, -1, 2))


def _read_q6_k(blocks: ByteArray) -> Rows:
    rows, count = blocks.shape[:2]
    low = blocks[..., :128].reshape(rows, count, 2, 2, GROUP_SIZE)  # [half of 128 columns, 32 of 64 bytes, byte]
    high = blocks[..., 128:192].reshape(rows, count, 2, 1, GROUP_SIZE)
    nibbles = np.concatenate([low & NIBBLE, low >> 4], axis=3)  # 4 groups of 32 columns
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    values = nibbles | ((high >> shifts & 3) << 4)
    steps = blocks[..., 192:208].view(np.int8).astype(np.float32) * _halves(blocks, 104, 1).astype(np.float32)
    return Rows(split_words(values.reshape(rows, -1, GROUP_SIZE), 6), steps.reshape(rows, -1, 2))


def _halves(blocks: ByteArray, first: int, count: int) -> npt.NDArray[np.float16]:
    """float16 numbers of each block, [rows, blocks, count]; `first` counts in float16."""
    return np.ascontiguousarray(blocks[..., 2 * first : 2 * (first + count)]).view(np.float16)


BLOCK_READERS: Final[Mapping[str, Callable[[ByteArray], Rows]]] = {
    "q4_0": _read_q4_0,
    "q4_1": _read_q4_1,
    "q5_0": _read_q5_0,
    "q8_0": _read_q8_0,
    "q4_k": _read_q4_k,
    "q6_k": _read_q6_k,
    "q5_1": _read_q5_1,
    "q5_k": _read_q5_k,
    "q3_k": _read_q3_k,
    "q2_k": _read_q2_k,
}
"""Take blocks, uint8 [rows, blocks of a row, bytes], apart. The layouts are ggml's (ggml-common.h)."""


def quantize_groups(weight: FloatArray) -> Rows:
    """float32 [rows, columns] as signed 8-bit values with a float16 scale for each 32 columns."""
    rows, columns = weight.shape
    padded = np.zeros((rows, num_groups(columns) * GROUP_SIZE), np.float32)
    padded[:, :columns] = weight
    groups = padded.reshape(rows, -1, GROUP_SIZE)
    largest = _largest(groups)
    if np.any(largest / 127 > np.finfo(np.float16).max):
        raise CheckpointError("A weight is too large for a float16 scale.", field="weight")
    scales = (largest / 127).astype(np.float16)
    return Rows(_to_bytes(groups, scales.astype(np.float32)), scales)


def quantize_channels(weight: FloatArray) -> Rows:
    """float32 [rows, columns] as signed 8-bit values with a float32 scale for each row."""
    rows, columns = weight.shape
    padded = np.zeros((rows, num_groups(columns) * GROUP_SIZE), np.float32)
    padded[:, :columns] = weight
    scales = _largest(padded) / np.float32(127)
    words = _to_bytes(padded, scales).reshape(rows, -1, GROUP_SIZE // 4)
    return Rows(words, scales[:, 0])


def _largest(values: FloatArray) -> FloatArray:
    """Largest magnitude along the last axis, which is kept."""
    largest: FloatArray = np.maximum(values.max(-1, keepdims=True), -values.min(-1, keepdims=True))
    if not np.all(np.isfinite(largest)):
        raise CheckpointError("A weight is infinite or not a number.", field="weight")
    return largest


def _to_bytes(values: FloatArray, scales: FloatArray) -> npt.NDArray[np.uint32]:
    """round(values / scales) + 128 in words of 4 bytes."""
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    quantized = np.clip(np.rint(values * inverse), -127, 127).astype(np.int8)
    return byte_words(quantized.view(np.uint8) ^ 128)
