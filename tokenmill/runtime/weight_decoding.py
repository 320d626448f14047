"""Weights of an engine to float tensors: what the torch executor computes with. Kernels read the bytes themselves."""

from __future__ import annotations

import math
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from tokenmill.checkpoints.gguf_dequantize import dequantize
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.program.formats import WEIGHT_FORMATS, rows_nbytes
from tokenmill.program.program import Weight

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

_GGML_TYPES: Final = ("q4_0", "q4_1", "q5_0", "q8_0", "q4_k", "q6_k")


def decode_weight(weight: Weight, content: Bytes) -> torch.Tensor:
    """The values of a weight: bfloat16 as it is, everything else as float32, in memory of its own.

    Args:
        weight: what `content` is.
        content: its bytes, in the layout `rows`; there may be more behind them.

    Raises:
        UnsupportedFeatureError: the weight is packed for kernels.
    """
    if weight.layout != "rows":
        raise UnsupportedFeatureError(
            f"The weight '{weight.name}' is packed as '{weight.layout}', which only the CPU's kernels read.",
            field="engine",
            remedy="Build the engine for the device that it shall run on, or with packing disabled.",
        )
    content = content[: rows_nbytes(weight.format, weight.shape)]
    if weight.format in ("float32", "bfloat16"):
        values = torch.from_numpy(np.array(content)).view(getattr(torch, weight.format))
        return values.reshape(weight.shape)
    if weight.format in _GGML_TYPES:
        return dequantize(content, weight.format.upper(), weight.shape)
    return torch.from_numpy(_decode_int8(weight, content))


def _decode_int8(weight: Weight, content: Bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    num_rows, num_columns = math.prod(weight.shape[:-1]), weight.shape[-1]
    rows = content.reshape(num_rows, WEIGHT_FORMATS[weight.format].row_nbytes(num_columns))
    if weight.format == "int8_channel":
        scales, values = _floats(rows[:, :4]), rows[:, 4:].view(np.int8)
        return (values * scales).astype(np.float32).reshape(weight.shape)
    assert weight.format == "int8_group32", weight.format
    groups = rows.reshape(num_rows, -1, 36)
    decoded = groups[:, :, 4:].view(np.int8) * _floats(groups[:, :, :4])
    return decoded.reshape(num_rows, -1)[:, :num_columns].astype(np.float32).reshape(weight.shape)


def _floats(content: Bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[..., 4] bytes to [..., 1] float32."""
    return np.ascontiguousarray(content).view("<f4")
