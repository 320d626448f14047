"""`GgufFile`: a memory-mapped GGUF file; its header is parsed in one pass, its tensors are read on demand.

The gguf library's own reader makes several numpy arrays for every vocabulary entry and so takes seconds to open a
file; this parser takes tens of milliseconds. Every length and offset is checked against the file's size before it is
used: a damaged file is a `CheckpointError` that names the file, never a crash or a huge allocation. Called by
`gguf_checkpoint` (configuration, weights) and by the tokenizer (metadata). Format: the GGUF specification of the ggml
project, `docs/gguf.md`, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tokenmill.checkpoints.gguf_dequantize import dequantize, ggml_block_sizes
from tokenmill.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_MAGIC: Final = b"GGUF"
_DEFAULT_ALIGNMENT: Final = 32
_MAX_DIMENSIONS: Final = 4

# Metadata value types by their number in the file: a struct code, or one of the two composite types.
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GgufTensorInfo:
    """Where one tensor lies in the file.

    Args:
        name: name as in the file.
        shape: shape in torch order (slowest dimension first; the file stores the reverse).
        ggml_type: name of the block type, such as `F32` or `Q4_K`.
        offset: first byte, counted from the start of the file.
        nbytes: size in the file.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: str
    offset: int
    nbytes: int


class GgufFile:
    """One GGUF file, opened for reading.

    Args:
        path: the `.gguf` file.

    Attributes:
        path: the same, as a `Path`.
        version: 2 or 3.
        metadata: every key of the header. Strings are `str`, string arrays lists of `str`, numeric arrays numpy arrays.
        tensors: every tensor by name, in file order.

    Raises:
        CheckpointError: the file cannot be opened, is no GGUF file, is truncated or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._data = _map_file(self.path)
        cursor = _Cursor(self._data, self.path)
        self.version, num_tensors, num_keys = _read_preamble(cursor)
        metadata_start = cursor.position
        self.metadata: dict[str, Any] = _read_metadata(cursor, num_keys)
        self._metadata_range = metadata_start, cursor.position
        self.tensors: dict[str, GgufTensorInfo] = _read_tensor_infos(cursor, num_tensors, self.metadata)

    def raw(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The tensor's bytes in the file: a read-only uint8 view [nbytes] of the mapping, no copy."""
        info = self.tensors[name]
        return np.frombuffer(self._data, dtype=np.uint8, count=info.nbytes, offset=info.offset)

    def without_tensors(self) -> bytes:
        """A GGUF file with the same metadata, byte for byte, and no tensors."""
        first, end = self._metadata_range
        preamble = _MAGIC + struct.pack("<IQQ", self.version, 0, len(self.metadata))
        return preamble + self._data[first:end]

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, dequantized: float32 of the tensor's shape, a copy that the caller owns.

        Raises:
            KeyError: no such tensor.
            CheckpointError: its block type cannot be dequantized.
        """
        info = self.tensors[name]
        try:
            return dequantize(self.raw(name), info.ggml_type, info.shape)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: tensor '{name}' has the type {info.ggml_type}, which cannot be dequantized.",
                field="model",
                remedy="Use a file of another quantization, such as Q4_K_M or Q8_0.",
            ) from None


def _map_file(path: Path) -> mmap.mmap | bytes:
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return b""  # an empty file cannot be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}: {error.strerror or error}.",
            field="model",
            remedy="Check the path and its permissions.",
        ) from error


class _Cursor:
    """A reading position in the mapped file that cannot leave it."""

    def __init__(self, data: mmap.mmap | bytes, path: Path) -> None:
        self._data = data
        self.path = path
        self.size = len(data)
        self.position = 0

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a whole GGUF file: {what}.",
            field="model",
            remedy="The file is truncated or damaged: download it again.",
        )

    def scalar(self, code: str) -> Any:
        """One little-endian value of the struct code."""
        num_bytes = struct.calcsize(f"<{code}")
        self._need(num_bytes)
        (value,) = struct.unpack_from(f"<{code}", self._data, self.position)
        self.position += num_bytes
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """`count` strings, each a 64-bit length and UTF-8 bytes. The hot loop of the parser: 260k turns for Gemma."""
        self._need(8 * count)
        data, size, position = self._data, self.size, self.position
        unpack_length = struct.Struct("<Q").unpack_from
        found: list[str] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack_length(data, position)[0]
                if position > size:
                    raise self.damaged(f"it ends inside a string at byte {start}")
                found.append(data[start:position].decode())
        except struct.error:
            raise self.damaged(f"it ends inside a string at byte {position}") from None
        except UnicodeDecodeError:
            raise self.damaged(f"the string that ends at byte {position} is not UTF-8") from None
        self.position = position
        return found

    def array(self, code: str, count: int) -> np.ndarray[Any, Any]:
        dtype = np.dtype(code).newbyteorder("<")
        self._need(count * dtype.itemsize)
        values = np.frombuffer(self._data, dtype=dtype, count=count, offset=self.position).copy()
        self.position += values.nbytes
        return values

    def _need(self, num_bytes: int) -> None:
        if num_bytes > self.size - self.position:
            raise self.damaged(f"{num_bytes} bytes wanted at byte {self.position} of {self.size}")


def _read_preamble(cursor: _Cursor) -> tuple[int, int, int]:
    """Magic and version; gives version, number of tensors, number of metadata keys."""
    if cursor.size < 4 or cursor.array("u1", 4).tobytes() != _MAGIC:
        raise cursor.damaged("it does not start with the letters GGUF")
    version = cursor.scalar("I")
    if version not in (2, 3):
        kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise CheckpointError(
            f"{cursor.path} is a {kind} GGUF file; versions 2 and 3, little-endian, can be read.",
            field="model",
            remedy="Convert the model again with a current converter.",
        )
    return version, cursor.scalar("Q"), cursor.scalar("Q")


def _read_metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise cursor.damaged(f"the metadata key '{key}' appears twice")
        metadata[key] = _read_value(cursor, cursor.scalar("I"), key)
    return metadata


def _read_value(cursor: _Cursor, value_type: int, key: str) -> Any:
    if value_type in _SCALARS:
        return cursor.scalar(_SCALARS[value_type])
    if value_type == _STRING:
        return cursor.string()
    if value_type != _ARRAY:
        raise cursor.damaged(f"the metadata key '{key}' has the unknown type {value_type}")
    item_type, count = cursor.scalar("I"), cursor.scalar("Q")
    if item_type == _STRING:
        return cursor.strings(count)
    if item_type not in _SCALARS:  # nested arrays are allowed by the format, but no model uses them
        raise cursor.damaged(f"the metadata key '{key}' is an array of the unknown type {item_type}")
    return cursor.array(_SCALARS[item_type], count)


def _read_tensor_infos(cursor: _Cursor, num_tensors: int, metadata: dict[str, Any]) -> dict[str, GgufTensorInfo]:
    """The table of tensors, with offsets made absolute and checked: all lie in the file, none overlap."""
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment!r}, which is not a power of two")
    sizes = ggml_block_sizes()
    relative: dict[str, GgufTensorInfo] = {}
    for _ in range(num_tensors):
        info = _read_tensor_info(cursor, sizes)
        if info.name in relative:
            raise cursor.damaged(f"the tensor '{info.name}' appears twice")
        if info.offset % alignment:
            raise cursor.damaged(f"the tensor '{info.name}' is not aligned to {alignment} bytes")
        relative[info.name] = info
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensorInfo] = {}
    previous_end, previous_name = data_start, ""
    for info in sorted(relative.values(), key=lambda info: info.offset):
        start = data_start + info.offset
        if start < previous_end:
            raise cursor.damaged(f"the tensors '{previous_name}' and '{info.name}' overlap")
        previous_end, previous_name = start + info.nbytes, info.name
        if previous_end > cursor.size:
            raise cursor.damaged(f"the tensor '{info.name}' ends at byte {previous_end} of {cursor.size}")
        tensors[info.name] = GgufTensorInfo(info.name, info.shape, info.ggml_type, start, info.nbytes)
    return tensors


def _read_tensor_info(cursor: _Cursor, sizes: dict[int, tuple[str, int, int]]) -> GgufTensorInfo:
    """One row of the table; its offset is still relative to the start of the data."""
    name = cursor.string()
    num_dimensions = cursor.scalar("I")
    if num_dimensions > _MAX_DIMENSIONS:
        raise cursor.damaged(f"the tensor '{name}' has {num_dimensions} dimensions")
    shape = tuple(int(size) for size in cursor.array("u8", num_dimensions)[::-1])
    type_number, offset = cursor.scalar("I"), cursor.scalar("Q")
    if type_number not in sizes:
        raise cursor.damaged(f"the tensor '{name}' has the unknown type {type_number}")
    ggml_type, block_size, block_bytes = sizes[type_number]
    row_size = shape[-1] if shape else 1
    if 0 in shape or row_size % block_size:
        raise cursor.damaged(f"the tensor '{name}' of shape {list(shape)} cannot be made of {ggml_type} blocks")
    return GgufTensorInfo(name, shape, ggml_type, offset, math.prod(shape) // block_size * block_bytes)
