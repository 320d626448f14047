"""From a program and a checkpoint to the bytes of an engine's weights.

On a CPU, quantized weights of `linear` and `experts` are packed for the integer kernels (layouts `packed...`, see
`ops/cpu/packing.py`); everything else, and all weights of engines for a GPU, are plain rows. Called when an engine is
built and when it is given new weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Final

import numpy as np

from tokenmill.builder.weight_source import WeightSource
from tokenmill.ops.cpu.packing import BLOCK_READERS, pack_blocks, pack_floats, packed_bytes
from tokenmill.program.formats import WEIGHT_FORMATS, rows_nbytes
from tokenmill.program.program import Operation, Program, Weight
from tokenmill.program.weight_file import ALIGNMENT, Bytes

ROWS: Final = "rows"
PACKED: Final = "packed"
"""Packed for the integer kernels: blocks of 16 rows."""
PACKED_GATED: Final = "packed_gated"
"""The same with gate and up rows alternating, for products with an activation."""
PACKED_EXPERTS: Final = "packed_experts"
PACKED_GATED_EXPERTS: Final = "packed_gated_experts"
"""The same for each expert's matrix by itself, one after the other."""

_EXPERT_LAYOUTS: Final = {"gate_up": PACKED_GATED_EXPERTS, "down": PACKED_EXPERTS}

ProgressCallback = Callable[[str, int, int], None]
"""Called with a weight's name, the values that are done, and all values."""


def choose_layouts(program: Program, device: str) -> Program:
    """The program with the layout of every weight. An embedding that is also the output head is looked up in the packed
    weight; any other weight that two kinds of operations read in different layouts becomes two."""
    if device != "cpu":
        return program
    weights = {weight.name: weight for weight in program.weights}
    heads = {
        name
        for operation in program.operations
        for role, name in operation.weights.items()
        if _layout(operation, role, weights[name]) == PACKED
    }
    chosen: dict[str, Weight] = {}
    operations = tuple(_with_layouts(operation, weights, heads, chosen) for operation in program.operations)
    return replace(program, weights=tuple(chosen.values()), operations=operations)


def _with_layouts(
    operation: Operation, weights: Mapping[str, Weight], heads: Set[str], chosen: dict[str, Weight]
) -> Operation:
    names: dict[str, str] = {}
    for role, name in operation.weights.items():
        layout = _layout(operation, role, weights[name])
        if operation.kind == "embedding" and name in heads:
            layout = PACKED
        # The plain rows keep the name; a packed copy of the same rows gets one of its own.
        own = name if layout == ROWS or not _is_shared(name, weights, chosen, layout) else f"{name}.{layout}"
        chosen[own] = replace(weights[name], name=own, layout=layout)
        names[role] = own
    return replace(operation, weights=names)


def _is_shared(name: str, weights: Mapping[str, Weight], chosen: Mapping[str, Weight], layout: str) -> bool:
    return name in chosen and chosen[name].layout != layout


def _layout(operation: Operation, role: str, weight: Weight) -> str:
    if operation.kind not in ("linear", "experts") or not WEIGHT_FORMATS[weight.format].is_quantized:
        return ROWS
    if operation.kind == "experts":
        return _EXPERT_LAYOUTS[role]
    return PACKED_GATED if "activation" in operation.attributes else PACKED


def pack_weights(
    program: Program,
    source: WeightSource,
    constants: Mapping[str, tuple[float, ...]],
    on_progress: ProgressCallback | None = None,
) -> dict[str, Bytes]:
    """The bytes of every weight of `program`, by name.

    Args:
        program: with layouts.
        source: has every part of every weight (`WeightSource.check`).
        constants: values of the weights that have no parts.
        on_progress: told after each weight.

    Raises:
        CheckpointError: a file is damaged, or a value cannot be stored.
    """
    total = sum(math.prod(weight.shape) for weight in program.weights)
    done = 0
    packed: dict[str, Bytes] = {}
    for weight in program.weights:
        packed[weight.name] = pack_weight(weight, source) if weight.parts else pack_constant(constants[weight.name])
        done += math.prod(weight.shape)
        if on_progress is not None:
            on_progress(weight.name, done, total)
    return packed


def packed_nbytes(weight: Weight) -> int:
    """Bytes of a weight in its format and layout, before it is packed; filled up as it lies in engines and memory."""
    if weight.layout == ROWS:
        num_bytes = rows_nbytes(weight.format, weight.shape)
    else:
        gated = weight.layout in (PACKED_GATED, PACKED_GATED_EXPERTS)
        count = 1
        if weight.layout in _EXPERT_LAYOUTS.values():
            count = len(weight.parts) // (2 if gated else 1)
        num_rows, num_columns = weight.shape
        num_bytes = count * packed_bytes(weight.format, num_rows // count, num_columns, gated=gated)
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def pack_constant(values: tuple[float, ...]) -> Bytes:
    """A computed vector as float32."""
    return np.asarray(values, np.float32).view(np.uint8)


def pack_weight(weight: Weight, source: WeightSource) -> Bytes:
    """The bytes of a weight in its format and layout, out of a checkpoint."""
    if weight.layout == ROWS:
        return np.ascontiguousarray(source.encoded(weight)).reshape(-1)
    if weight.layout in _EXPERT_LAYOUTS.values():
        return _packed_experts(weight, source)
    gated = weight.layout == PACKED_GATED
    halves = list(_halves(weight)) if gated else [weight]
    if weight.format in BLOCK_READERS:
        parts = [source.encoded(half) for half in halves]
        return pack_blocks(weight.format, parts, weight.shape[1], gated=gated).data
    return pack_floats(weight.format, [source.values(half) for half in halves], gated=gated).data


def _packed_experts(weight: Weight, source: WeightSource) -> Bytes:
    """Each expert's matrix packed; an expert is one part of the weight, or two: gate and up."""
    gated = weight.layout == PACKED_GATED_EXPERTS
    step = 2 if gated else 1
    packed: list[Bytes] = []
    for first in range(0, len(weight.parts), step):
        parts = weight.parts[first : first + step]
        shape = (sum(part.num_rows for part in parts), weight.shape[1])
        layout = PACKED_GATED if gated else PACKED
        packed.append(pack_weight(replace(weight, parts=parts, shape=shape, layout=layout), source))
    return np.concatenate(packed)


def _halves(weight: Weight) -> Iterator[Weight]:
    """Gate and up rows as weights of their own; the checkpoint's tensors do not cross the middle."""
    middle = weight.shape[0] // 2
    gate = [part for index, part in enumerate(weight.parts) if _end(weight, index) <= middle]
    assert sum(part.num_rows for part in gate) == middle, f"{weight.name} has no gate and up parts of one size"
    for parts in (gate, weight.parts[len(gate) :]):
        yield replace(weight, parts=tuple(parts), shape=(middle, *weight.shape[1:]))


def _end(weight: Weight, index: int) -> int:
    return sum(part.num_rows for part in weight.parts[: index + 1])
