"""`weights.safetensors` of an engine: every weight's bytes in one file that is used where it is mapped.

Each tensor is a vector of uint8, because formats and layouts are the program's business, filled with zeros to a
multiple of 64 bytes, so that every weight begins at a multiple of 64; the data begins at a multiple of 4,096. Called by
`package.py`. Format: https://github.com/huggingface/safetensors, read here without the library because a mapping
of the whole file is wanted.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias

import numpy as np

from tokenmill.errors import EngineFileError

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
"""A vector of uint8."""

ALIGNMENT: Final = 64
_DATA_ALIGNMENT: Final = 4096
_MAX_HEADER_BYTES: Final = 100 << 20
_METADATA: Final = {"format": "tokenmill-engine-weights"}
_DAMAGED: Final = "The file is truncated or damaged: copy the engine again, or build it again with `tokenmill build`."


def weight_file_chunks(weights: Mapping[str, Bytes]) -> Iterator[Bytes]:
    """The file, piece by piece: the header, then each weight and what fills it up."""
    header: dict[str, Any] = {"__metadata__": _METADATA}
    position = 0
    for name, content in weights.items():
        end = position + _padded(content.nbytes)
        header[name] = {"dtype": "U8", "shape": [end - position], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _DATA_ALIGNMENT)
    yield np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8)
    for content in weights.values():
        yield content
        if content.nbytes % ALIGNMENT:
            yield np.zeros(_padded(content.nbytes) - content.nbytes, np.uint8)


def read_weight_file(data: Bytes, source: str) -> dict[str, Bytes]:
    """The weights in a mapped file, each with what fills it up: views, nothing is copied.

    Args:
        data: the whole file.
        source: its name, for errors.

    Raises:
        EngineFileError: it is no such file, or ends too early.
    """
    text = _header_text(data, source)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(source, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict) or header.pop("__metadata__", None) != _METADATA:
        raise _damaged(source, "its header is not that of an engine's weights")
    start = 8 + len(text)
    weights: dict[str, Bytes] = {}
    position = 0
    for name, entry in header.items():
        end = _end_of_entry(entry, position)
        if end is None or start + end > data.nbytes:
            raise _damaged(source, f"the entry of '{name}' does not fit the file")
        weights[name] = data[start + position : start + end]
        position = end
    if start + position != data.nbytes:
        raise _damaged(source, f"it has {data.nbytes} bytes instead of {start + position}")
    return weights


def _header_text(data: Bytes, source: str) -> bytes:
    if data.nbytes < 8:
        raise _damaged(source, f"it has {data.nbytes} bytes")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    if length > min(_MAX_HEADER_BYTES, data.nbytes - 8):
        raise _damaged(source, f"its header of {length} bytes does not fit the file")
    return data[8 : 8 + length].tobytes()


def _end_of_entry(entry: object, position: int) -> int | None:
    """Where the tensor's bytes end; None if the entry is not one that `weight_file_chunks` writes."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"} or entry["dtype"] != "U8":
        return None
    offsets, shape = entry["data_offsets"], entry["shape"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not isinstance(shape, list):
        return None
    first, end = offsets
    if type(first) is not int or type(end) is not int or first != position or end <= first or shape != [end - first]:
        return None
    return None if end % ALIGNMENT else end


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _damaged(source: str, what: str) -> EngineFileError:
    return EngineFileError(f"{source} is not a whole weights file: {what}.", field="engine", remedy=_DAMAGED)
