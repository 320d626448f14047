"""Weights of an engine to float tensors: what the torch executor computes with. Kernels read the bytes themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from tokenmill.checkpoints.row_formats import decode_rows
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.program.formats import WEIGHT_FORMATS, rows_nbytes
from tokenmill.program.program import Program, Weight

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

_CONVERTED_TO: Final[Mapping[str, str]] = MappingProxyType(
    {"add_bias": "x", "embedding": "y", "experts": "x", "linear": "x"}
)
"""Operations whose weights `torch_operations` brings to the type of an operand, and which one."""


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


def decoded_nbytes(program: Program) -> int:
    """Bytes that `TorchProgram` takes for all weights: floats of the types that its operations compute in.

    A weight that operations read in another type than it is decoded to is there once for each of them.
    """
    dtypes = {buffer.name: buffer.dtype for buffer in (*program.inputs, *program.buffers, program.output)}
    weights = {weight.name: weight for weight in program.weights}
    nbytes: dict[tuple[str, str], int] = {}
    for operation in program.operations:
        operand = {**operation.inputs, **operation.outputs}.get(_CONVERTED_TO.get(operation.kind, ""))
        for name in operation.weights.values():
            decoded = "bfloat16" if weights[name].format == "bfloat16" else "float32"
            used = decoded if operand is None else "bfloat16" if dtypes[operand.buffer] == "bfloat16" else "float32"
            reader = "" if used == decoded else operation.name
            nbytes[name, reader] = math.prod(weights[name].shape) * (2 if used == "bfloat16" else 4)
    return sum(nbytes.values())
