"""Columns of an op row, and the memory layout of `int8_group32` activations. Shared by all kernels of `ops/cpu/`.

`int8_group32` holds T tokens of K columns as G = ceil(K / 32) groups in panels of P = `panel_width(T)` tokens. The
record of panel p and group g starts at byte (p * G + g) * 40 * P:

| bytes | content |
|---|---|
| 0 .. 32 P | int8 values [8][P][4]: column 4 i + j of the group and token t at (i * P + t) * 4 + j |
| 32 P .. 36 P | float32 scale of each token: largest magnitude / 127 |
| 36 P .. 40 P | float32 scale * (sum of the 32 values) of each token |

Values are round(x / scale), half to even; a group of zeros has scale 0. Columns beyond K are 0. Tokens beyond T (the
last panel is whole) may hold anything: nothing of a token reaches another one.
"""

from __future__ import annotations

from typing import Final

ROW_SIZE: Final = 32
"""int64 in a row of the op list."""

COLUMN_KERNEL: Final = 0
COLUMN_NUM_TOKENS: Final = 1
COLUMN_BARRIER: Final = 2
FIRST_ARGUMENT: Final = 3

GROUP_SIZE: Final = 32
"""Columns that share one scale."""

GROUP_BYTES: Final = 40
"""Bytes of one token's group: values, scale, sum."""

MAX_PANEL_WIDTH: Final = 16


def panel_width(num_tokens: int) -> int:
    """Tokens of one panel: 1, 4, 8 or 16. Also callable in kernels, as `device_panel_width`."""
    if num_tokens == 1:
        return 1
    if num_tokens <= 4:
        return 4
    if num_tokens <= 8:
        return 8
    return 16


def int8_group32_bytes(num_tokens: int, num_columns: int) -> int:
    """Bytes of an `int8_group32` buffer. It never shrinks with more tokens."""
    width = panel_width(num_tokens)
    num_panels = -(-num_tokens // width)
    num_groups = -(-num_columns // GROUP_SIZE)
    return num_panels * num_groups * GROUP_BYTES * width
