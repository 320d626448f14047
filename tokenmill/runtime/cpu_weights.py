"""Weights of an engine in the memory of the CPU's kernels: packed for products, as rows for look-ups, or plain floats.

What the engine holds packed is copied into huge pages; what it holds as rows is packed on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np

from tokenmill.errors import EngineFileError, UnsupportedFeatureError
from tokenmill.ops.cpu.linear_float import pack_float_weight
from tokenmill.ops.cpu.linear_int8 import LinearWeight
from tokenmill.ops.cpu.packing import ENCODINGS, PackedWeight, pack_blocks, pack_floats, packed_bytes
from tokenmill.program.formats import WEIGHT_FORMATS, rows_nbytes
from tokenmill.program.program import Program, Weight
from tokenmill.runtime.cpu_memory import ProgramMemory
from tokenmill.runtime.huge_pages import Bytes
from tokenmill.runtime.weight_decoding import decode_weight

PACKED: Final = "packed"
PACKED_GATED: Final = "packed_gated"
"""Layouts of `Weight`: the bytes of `ops.cpu.packing.PackedWeight`, plain and gated."""

PACKED_EXPERTS: Final = "packed_experts"
PACKED_GATED_EXPERTS: Final = "packed_gated_experts"
"""The same for the matrices of several experts, one after the other."""

BLOCK_FORMATS: Final = frozenset(encoding.format for encoding in ENCODINGS if encoding.block_columns)


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """The packed matrices of experts in memory.

    Args:
        first: the first expert's: its address is that of all.
        num_bytes: of each.
    """

    first: LinearWeight
    num_bytes: int


class CpuWeights:
    """Brings weights into memory when an operation asks for them; each layout of a weight once.

    Args:
        program: whose weights they are.
        contents: their bytes, by name.
        memory: where they go.
    """

    def __init__(self, program: Program, contents: Mapping[str, Bytes], memory: ProgramMemory) -> None:
        self._weights = {weight.name: weight for weight in program.weights}
        products = [operation for operation in program.operations if operation.kind == "linear"]
        self._heads = {one.weights["weight"] for one in products if "activation" not in one.attributes}
        self._contents = contents
        self._memory = memory
        self._placed: dict[tuple[str, str], int] = {}

    def __getitem__(self, name: str) -> Weight:
        return self._weights[name]

    def floats(self, name: str) -> int:
        """Address of a weight as float32."""
        return self._place(
            name, "floats", lambda: decode_weight(self._weights[name], self._content(name)).float().numpy()
        )

    def rows(self, name: str) -> int:
        """Address of a weight's rows in its own format."""
        content = self._row_content(self._weights[name])
        return self._place(name, "rows", lambda: content)

    def table(self, name: str) -> tuple[int, bool]:
        """Address of a weight for look-ups, and whether it is packed: so is one that products read, too."""
        if name not in self._heads:
            return self.rows(name), False
        if WEIGHT_FORMATS[self._weights[name].format].is_quantized:
            return self.linear(name, gated=False).address, True
        return self.float_linear(name, gated=False), True

    def linear(self, name: str, *, gated: bool) -> LinearWeight:
        """A quantized weight for the integer kernels."""
        weight = self._weights[name]
        layout = PACKED_GATED if gated else PACKED
        address = self._place(name, layout, lambda: self._packed(weight, gated))
        num_rows, num_columns = weight.shape
        return LinearWeight(address, weight.format, num_rows, num_columns, gated)

    def float_linear(self, name: str, *, gated: bool) -> int:
        """Address of a float weight, packed for the float kernels."""
        weight = self._weights[name]
        return self._place(
            name,
            "float gated" if gated else "float",
            lambda: _packed_floats(weight, self._row_content(weight), gated=gated),
        )

    def experts(self, name: str, num_experts: int, *, gated: bool) -> ExpertStack:
        """The matrices of experts, which lie below each other in a weight, quantized or float."""
        weight = self._weights[name]
        one = replace(weight, shape=(weight.shape[0] // num_experts, weight.shape[1]))
        if WEIGHT_FORMATS[weight.format].is_quantized:
            layout = PACKED_GATED_EXPERTS if gated else PACKED_EXPERTS
            pack: Callable[[Weight, Bytes], Bytes] = partial(_packed_rows, gated=gated)
        else:
            layout = "float gated experts" if gated else "float experts"
            pack = partial(_packed_floats, gated=gated)
        size = len(pack(one, np.zeros(rows_nbytes(one.format, one.shape), np.uint8)))
        address = self._place(name, layout, lambda: self._stack(weight, layout, size * num_experts, one, pack))
        num_rows, num_columns = one.shape
        return ExpertStack(LinearWeight(address, weight.format, num_rows, num_columns, gated), size)

    def _stack(
        self, weight: Weight, layout: str, size: int, one: Weight, pack: Callable[[Weight, Bytes], Bytes]
    ) -> Bytes:
        if weight.layout == layout:
            return self._whole(weight, size)
        content = self._row_content(weight).reshape(weight.shape[0] // one.shape[0], -1)
        return np.concatenate([pack(one, rows) for rows in content])

    def _packed(self, weight: Weight, gated: bool) -> Bytes:
        if weight.layout == (PACKED_GATED if gated else PACKED):
            return self._whole(weight, packed_bytes(weight.format, *weight.shape, gated=gated))
        return _packed_rows(weight, self._row_content(weight), gated=gated)

    def _whole(self, weight: Weight, size: int) -> Bytes:
        content = self._content(weight.name)
        if content.nbytes < size:  # kernels would read what lies behind it
            raise EngineFileError(
                f"The packed weight '{weight.name}' has {content.nbytes} bytes instead of {size}.",
                field="engine",
                remedy="Build the engine again with `tokenmill build`.",
            )
        return content[:size]

    def _row_content(self, weight: Weight) -> Bytes:
        self._check_rows(weight)
        return self._content(weight.name)[: rows_nbytes(weight.format, weight.shape)]

    def _check_rows(self, weight: Weight) -> None:
        if weight.layout != "rows":
            raise UnsupportedFeatureError(
                f"The weight '{weight.name}' is laid out as '{weight.layout}', which this kernel does not read.",
                field="engine",
                remedy="Build the engine again with `tokenmill build`.",
            )

    def _content(self, name: str) -> Bytes:
        return self._contents[name]

    def _place(self, name: str, layout: str, content: Any) -> int:
        key = (name, layout)
        if key not in self._placed:
            self._placed[key] = self._memory.put(content())
        return self._placed[key]


def _packed_floats(weight: Weight, content: Bytes, *, gated: bool) -> Bytes:
    """A float weight's rows packed for the float kernels."""
    values: Any = content.view(np.float32 if weight.format == "float32" else np.uint16).reshape(weight.shape)
    return pack_float_weight(np.split(values, 2) if gated else [values], gated=gated)


def _packed_rows(weight: Weight, content: Bytes, *, gated: bool) -> Bytes:
    """A quantized weight's rows packed for the integer kernels."""
    rows = content.reshape(weight.shape[0], -1)
    return _pack(weight.format, np.split(rows, 2) if gated else [rows], weight.shape[1], gated).data


def _pack(weight_format: str, parts: list[Bytes], num_columns: int, gated: bool) -> PackedWeight:
    if weight_format in BLOCK_FORMATS:
        return pack_blocks(weight_format, parts, num_columns, gated=gated)
    assert WEIGHT_FORMATS[weight_format].is_quantized, weight_format
    decoded = []
    for rows in parts:
        part = Weight("", (len(rows), num_columns), weight_format)
        decoded.append(decode_weight(part, np.ascontiguousarray(rows).reshape(-1)).float().numpy())
    return pack_floats(weight_format, decoded, gated=gated)  # values on the grid of their scale keep their levels
