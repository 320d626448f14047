"""GGUF block types to float32, with the gguf library's numpy dequantization (300 to 800 million values a second).

Called by `gguf_reader`. The library imports in about 0.1 s, so it is imported when the first file is opened. Threads
do not help: the library works on groups of 16 rows and spends much of its time holding the interpreter's lock.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    import torch

_CHUNK_VALUES: Final = 1 << 20
_PLAIN_TYPES: Final = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}
"""Block types of one value each, and torch's name for them."""


def ggml_block_sizes() -> dict[int, tuple[str, int, int]]:
    """Every block type by its number in the file: name, values in a block, bytes of a block."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def can_dequantize(ggml_type: str) -> bool:
    """Whether `dequantize` knows this block type: the library names more types than it can read."""
    if ggml_type in _PLAIN_TYPES:
        return True
    sizes = {name: (block_size, block_bytes) for name, block_size, block_bytes in ggml_block_sizes().values()}
    block_size, block_bytes = sizes[ggml_type]
    try:
        dequantize(np.zeros(block_bytes, dtype=np.uint8), ggml_type, (block_size,))
    except NotImplementedError:
        return False
    return True


def dequantize(raw: np.ndarray[Any, np.dtype[np.uint8]], ggml_type: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The values of `raw`, a tensor's bytes as they lie in the file.

    Args:
        raw: [nbytes] uint8.
        ggml_type: name of the block type.
        shape: shape of the result.

    Returns:
        float32 of `shape`, in memory of its own.

    Raises:
        NotImplementedError: the gguf library cannot dequantize this type.
    """
    import torch  # late: who reads metadata alone, such as a tokenizer, needs none

    if ggml_type in _PLAIN_TYPES:
        # torch views bytes as bfloat16, which numpy does not know; the copy also makes the bytes writable and aligned
        return (
            torch.from_numpy(raw.copy()).view(getattr(torch, _PLAIN_TYPES[ggml_type])).reshape(shape).to(torch.float32)
        )
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize as dequantize_blocks

    kind = GGMLQuantizationType[ggml_type]
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    num_rows, row_size = math.prod(shape[:-1]), shape[-1]
    rows = raw.reshape(num_rows, row_size // block_size * block_bytes)
    values = np.empty((num_rows, row_size), dtype=np.float32)
    # The library keeps a second copy of its result for a moment; chunks keep that copy in the processor's cache.
    chunk_rows = max(1, _CHUNK_VALUES // row_size)
    with np.errstate(over="ignore", invalid="ignore"):  # infinite weights are for the engine to notice
        for start in range(0, num_rows, chunk_rows):
            values[start : start + chunk_rows] = dequantize_blocks(rows[start : start + chunk_rows], kind)
    return torch.from_numpy(values).reshape(shape)
