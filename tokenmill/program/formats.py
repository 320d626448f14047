"""How the values of weights are encoded: the formats of `Weight.format`, in the layout `rows`.

A weight of layout `rows` is one row of bytes for each output feature, `row_nbytes` long, without padding between rows.
The block types are those of ggml, byte for byte, so that a GGUF file's tensors are used as they are. Packed layouts are
made of these rows by the executor's packing. Read by the builder (`weight_source.py`), the packing and the executors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One encoding of a row of K values.

    Args:
        name: as in `Weight.format`.
        block_size: values in a block; K must be a multiple of it, but for the int8 formats (see `meaning`).
        block_nbytes: bytes of a block.
        row_header_nbytes: bytes before the first block of a row.
        is_quantized: whether a block holds integers and scales.
        meaning: bytes of a block, in order, little-endian.
    """

    name: str
    block_size: int
    block_nbytes: int
    row_header_nbytes: int = 0
    is_quantized: bool = True
    meaning: str = ""

    def row_nbytes(self, num_columns: int) -> int:
        """Bytes of a row of `num_columns` values."""
        return self.row_header_nbytes + -(-num_columns // self.block_size) * self.block_nbytes

    def fits(self, num_columns: int) -> bool:
        """Whether rows of `num_columns` values can be encoded; ggml's blocks cannot be short."""
        return self.name in _MAY_END_SHORT or num_columns % self.block_size == 0


_MAY_END_SHORT: Final = ("int8_group32",)

_ALL: Final = (
    WeightFormat("float32", 1, 4, is_quantized=False, meaning="the value"),
    WeightFormat("bfloat16", 1, 2, is_quantized=False, meaning="the value"),
    WeightFormat("int8_channel", 1, 1, 4, meaning="row: float32 scale; then int8 values: w = scale * q"),
    WeightFormat(
        "int8_group32", 32, 34, meaning="float16 scale, 32 int8; w = scale * q; the last group is filled with 0"
    ),
    WeightFormat("q4_0", 32, 18, meaning="float16 d, 16 bytes: low nibbles are values 0..15; w = d * (q - 8)"),
    WeightFormat("q4_1", 32, 20, meaning="float16 d, float16 m, 16 bytes of nibbles as q4_0; w = d * q + m"),
    WeightFormat("q5_0", 32, 22, meaning="float16 d, 4 bytes of fifth bits, 16 bytes of nibbles; w = d * (q - 16)"),
    WeightFormat("q5_1", 32, 24, meaning="float16 d, float16 m, then as q5_0; w = d * q + m"),
    WeightFormat("q8_0", 32, 34, meaning="float16 d, 32 int8; w = d * q"),
    WeightFormat("q4_k", 256, 144, meaning="float16 d and dmin, 12 bytes of 6-bit scales and minima, 128 of nibbles"),
    WeightFormat("q2_k", 256, 84, meaning="16 bytes of 4-bit scales and minima, 64 of values, float16 d and dmin"),
    WeightFormat("q3_k", 256, 110, meaning="32 bytes of third bits, 64 of low bits, 12 of 6-bit scales, float16 d"),
    WeightFormat("q5_k", 256, 176, meaning="as q4_k, with 32 bytes of fifth bits before the nibbles"),
    WeightFormat("q6_k", 256, 210, meaning="128 bytes of low nibbles, 64 of high bits, 16 int8 scales, float16 d"),
)

WEIGHT_FORMATS: Final[Mapping[str, WeightFormat]] = MappingProxyType({one.name: one for one in _ALL})
"""Every format by name."""


def rows_nbytes(format_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a weight of `shape` in the layout `rows`; a vector is one row.

    Raises:
        KeyError: no such format.
    """
    return math.prod(shape[:-1]) * WEIGHT_FORMATS[format_name].row_nbytes(shape[-1])
