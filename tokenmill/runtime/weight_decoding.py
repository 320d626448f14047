"""Weights of an engine to float tensors: what the torch executor computes with. Kernels read the bytes themselves."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch

from tokenmill.checkpoints.row_formats import decode_rows
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.program.formats import WEIGHT_FORMATS, rows_nbytes
from tokenmill.program.program import Weight

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]


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
    num_columns = weight.shape[-1]
    rows = content[: rows_nbytes(weight.format, weight.shape)].reshape(
        -1, WEIGHT_FORMATS[weight.format].row_nbytes(num_columns)
    )
    if weight.format == "bfloat16":
        return torch.from_numpy(np.array(rows)).view(torch.bfloat16).reshape(weight.shape)
    return decode_rows(rows, weight.format, num_columns).reshape(weight.shape)
