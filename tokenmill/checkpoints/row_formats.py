"""Values to rows of bytes and back, in every format of `program/formats.py`.

`encode_rows` quantizes (or rounds) weights for an engine, `decode_rows` gives the values that an encoded weight stands
for. Called by the builder, and by executors that compute with plain numbers.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional

from tokenmill.checkpoints.gguf_dequantize import dequantize
from tokenmill.errors import CheckpointError
from tokenmill.program.formats import WEIGHT_FORMATS

Rows = np.ndarray[Any, np.dtype[np.uint8]]
"""Encoded rows, [rows, bytes of a row]."""

BLOCK_TYPES: Final = {
    name: name.lower()
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
}  # fmt: skip
"""ggml block types that are formats of weights too, and the formats' names."""

CAN_ENCODE: Final = ("float32", "bfloat16", "int8_channel", "int8_group32", "q4_0", "q4_1", "q5_0", "q8_0")
"""Formats that `encode_rows` writes; the others only come from files that have them."""

_GGML_NAMES: Final = {format_name: block_type for block_type, format_name in BLOCK_TYPES.items()}
_LARGEST_INT8: Final = 127.0


def encode_rows(values: torch.Tensor, format_name: str) -> Rows:
    """`values` [N, K] of any floating-point type in a format of `CAN_ENCODE`.

    int8 is symmetric: the largest magnitude of a row or group of 32 becomes 127. The block types are ggml's own.
    """
    assert values.dim() == 2 and format_name in CAN_ENCODE, (values.shape, format_name)
    if format_name in ("float32", "bfloat16"):
        dtype = torch.float32 if format_name == "float32" else torch.bfloat16
        return values.to(dtype).contiguous().view(torch.uint8).numpy()
    if format_name == "int8_channel":
        return _int8(values.float(), torch.float32)
    if format_name == "int8_group32":
        groups = functional.pad(values.float(), (0, -values.shape[1] % 32)).reshape(values.shape[0], -1, 32)
        return _int8(groups, torch.float16).reshape(values.shape[0], -1)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    blocks = quantize(values.float().contiguous().numpy(), GGMLQuantizationType[_GGML_NAMES[format_name]])
    return np.ascontiguousarray(blocks, dtype=np.uint8)


def decode_rows(rows: Rows, format_name: str, num_columns: int) -> torch.Tensor:
    """The float32 values [N, num_columns] of encoded rows."""
    num_rows = rows.shape[0]
    assert rows.shape[1] == WEIGHT_FORMATS[format_name].row_nbytes(num_columns), (rows.shape, format_name, num_columns)
    if format_name in ("float32", "bfloat16"):
        dtype = torch.float32 if format_name == "float32" else torch.bfloat16
        return torch.from_numpy(rows.copy()).view(dtype).float()
    if format_name == "int8_channel":
        return _decode_int8(rows, torch.float32)
    if format_name == "int8_group32":
        return _decode_int8(rows.reshape(-1, 34), torch.float16).reshape(num_rows, -1)[:, :num_columns]
    return dequantize(np.ascontiguousarray(rows).reshape(-1), _GGML_NAMES[format_name], (num_rows, num_columns))


def _int8(values: torch.Tensor, scale_dtype: torch.dtype) -> Rows:
    """For each row of the last dimension the bytes of its scale and of its int8 values, one after the other."""
    scales = (values.abs().amax(dim=-1, keepdim=True) / _LARGEST_INT8).to(scale_dtype)
    if not torch.isfinite(scales).all():
        raise CheckpointError(
            "A weight is infinite, not a number, or too large for a float16 scale.",
            field="model",
            remedy="Check the checkpoint, or build with quantization='none'.",
        )
    divisors = scales.float().masked_fill(scales == 0.0, 1.0)
    integers = torch.round(values / divisors).clamp(-_LARGEST_INT8, _LARGEST_INT8).to(torch.int8)
    parts = [part.contiguous().view(torch.uint8).numpy() for part in (scales, integers)]
    return np.concatenate(parts, axis=-1)


def _decode_int8(rows: Rows, scale_dtype: torch.dtype) -> torch.Tensor:
    """Rows of a scale and int8 values."""
    size = scale_dtype.itemsize
    scales = torch.from_numpy(rows[:, :size].copy()).view(scale_dtype).float()
    return torch.from_numpy(rows[:, size:].copy()).view(torch.int8).float() * scales
