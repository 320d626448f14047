"""`check_program`: whether a program can be executed as it stands.

Every reference is followed, every role, type and size compared with what `OPERATIONS` says. Executors trust a program
that passed: their kernels check nothing. Called by the builder after lowering and by `package.py` after decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from tokenmill.errors import EngineFileError, did_you_mean
from tokenmill.program.buffer_sizes import buffer_nbytes
from tokenmill.program.formats import WEIGHT_FORMATS
from tokenmill.program.operation_sizes import COLUMN_RULES, SizesOfOperation
from tokenmill.program.program import (
    OPERATIONS,
    AttributeValue,
    Buffer,
    Operand,
    Operation,
    OperationKind,
    Program,
    Weight,
)

_INPUTS: Final[Mapping[str, str]] = {"token_ids": "tokens", "positions": "tokens", "row_index": "rows"}
_ACTIVATIONS: Final = ("silu", "gelu_pytorch_tanh")
_TRANSFORMS: Final = ("none", "add_one")
_MAY_WRITE_INT8: Final = ("rms_norm", "add_rms_norm", "quantize", "linear", "gated_activation")
_INTEGER_ATTRIBUTES: Final = (
    "head_dim",
    "layer",
    "num_experts",
    "num_heads",
    "num_kv_heads",
    "sliding_window",
    "top_k",
)
_ENCODED: Final = (("linear", "weight"), ("embedding", "table"), ("experts", "gate_up"), ("experts", "down"))
"""The weights that may be in any format; all others are plain float32."""

_REMEDY: Final = "Build the engine again with `tokenmill build`."


def check_program(program: Program, source: str = "program", *, max_tokens: int = 1, max_rows: int = 1) -> None:
    """Check everything that an executor relies on.

    Args:
        program: what to check.
        source: what errors call it, such as the file's name.
        max_tokens, max_rows: of the largest step, for which the buffers must lie in the arena.

    Raises:
        EngineFileError: the first thing that is wrong, with the operation's or buffer's name.
    """
    try:
        _Checker(program, max_tokens, max_rows).check()
    except _Wrong as wrong:
        raise EngineFileError(f"{source}: {wrong}.", field="engine", remedy=_REMEDY) from None


class _Wrong(Exception):
    """What is wrong with the program, in words."""


@dataclass(slots=True)
class _Checker:
    program: Program
    max_tokens: int
    max_rows: int
    buffers: dict[str, Buffer] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)
    cached_columns: dict[int, int] = field(default_factory=dict)
    """Columns of the keys that were written to each layer's cache."""

    def check(self) -> None:
        self._check_declarations()
        names: set[str] = set()
        for operation in self.program.operations:
            if operation.name in names:
                raise _Wrong(f"two operations are called '{operation.name}'")
            names.add(operation.name)
            try:
                self._check_operation(operation)
            except _Wrong as wrong:
                raise _Wrong(f"operation '{operation.name}' ({operation.kind}): {wrong}") from None
        if self.program.output.name not in self.written:
            raise _Wrong(f"no operation writes the output '{self.program.output.name}'")

    # ---- buffers and weights ---------------------------------------------------------------------------------

    def _check_declarations(self) -> None:
        given = {one.name: one.rows for one in self.program.inputs}
        if given != dict(_INPUTS):
            raise _Wrong(f"its inputs are {given} instead of {dict(_INPUTS)}")
        for one in self.program.inputs:
            if one.columns != 1 or one.dtype != "int32" or one.offset is not None:
                raise _Wrong(f"the input '{one.name}' is not one column of int32 outside the arena")
        output = self.program.output
        if output.rows != "rows" or output.dtype != "float32" or output.offset is not None:
            raise _Wrong(f"the output '{output.name}' is not float32 with a row for each wanted token")
        for buffer in (*self.program.inputs, output, *self.program.buffers):
            if buffer.name in self.buffers:
                raise _Wrong(f"two buffers are called '{buffer.name}'")
            if buffer.columns < 1 or (isinstance(buffer.rows, int) and buffer.rows < 1):
                raise _Wrong(f"the buffer '{buffer.name}' is empty")
            self.buffers[buffer.name] = buffer
        self._check_arena()
        for weight in self.program.weights:
            if weight.name in self.weights:
                raise _Wrong(f"two weights are called '{weight.name}'")
            _check_weight(weight)
            self.weights[weight.name] = weight
        self.written = {one.name for one in self.program.inputs}

    def _check_arena(self) -> None:
        arena = self.program.arena_bytes
        if arena < 0:
            raise _Wrong(f"arena_bytes is {arena}")
        for buffer in self.program.buffers:
            if arena == 0 and buffer.offset is None:
                continue  # memory is not planned yet
            if buffer.offset is None or buffer.offset < 0:
                raise _Wrong(f"the buffer '{buffer.name}' starts at byte {buffer.offset}")
            end = buffer.offset + buffer_nbytes(buffer, self.max_tokens, self.max_rows)
            if end > arena:
                raise _Wrong(f"the buffer '{buffer.name}' ends at byte {end} of an arena of {arena}")

    # ---- operations ------------------------------------------------------------------------------------------

    def _check_operation(self, operation: Operation) -> None:
        kind = OPERATIONS.get(operation.kind)
        if kind is None:
            raise _Wrong(f"there is no such kind of operation; {did_you_mean(operation.kind, OPERATIONS)}")
        _check_roles("input", operation.inputs, kind.inputs)
        _check_roles("output", operation.outputs, kind.outputs)
        _check_roles("weight", operation.weights, kind.weights)
        _check_roles("attribute", operation.attributes, kind.attributes)
        for role, name in operation.weights.items():
            if name not in self.weights:
                raise _Wrong(f"its {role} '{name}' is not a weight of the program")
            weight = self.weights[name]
            if (operation.kind, role) not in _ENCODED and (weight.format, weight.layout) != ("float32", "rows"):
                raise _Wrong(f"its {role} '{name}' is {weight.format} in the layout {weight.layout}, not plain float32")
        for name, value in operation.attributes.items():
            _check_attribute(name, value)
        for role, operand in (*operation.inputs.items(), *operation.outputs.items()):
            self._check_operand(role, operand)
        for role, operand in operation.inputs.items():
            if operand.buffer not in self.written:
                raise _Wrong(f"its {role} '{operand.buffer}' is read before anything was written there")
        self._check_rows(operation)
        self._check_types(operation, kind)
        self._check_columns(operation)
        self._check_cache(operation)
        self.written.update(operand.buffer for operand in operation.outputs.values())

    def _check_operand(self, role: str, operand: Operand) -> None:
        buffer = self.buffers.get(operand.buffer)
        if buffer is None:
            raise _Wrong(f"its {role} '{operand.buffer}' is not a buffer of the program")
        end = operand.first_column + operand.num_columns
        if operand.first_column < 0 or operand.num_columns < 1 or end > buffer.columns:
            raise _Wrong(
                f"its {role} is columns {operand.first_column} to {end - 1} of '{operand.buffer}', "
                f"which has {buffer.columns}"
            )

    def _check_rows(self, operation: Operation) -> None:
        rows = {role: self.buffers[operand.buffer].rows for role, operand in operation.inputs.items()}
        rows |= {role: self.buffers[operand.buffer].rows for role, operand in operation.outputs.items()}
        if operation.kind == "select_rows":
            if (rows["x"], rows["row_index"], rows["y"]) != ("tokens", "rows", "rows"):
                raise _Wrong(f"it selects from {rows['x']} by {rows['row_index']} into {rows['y']}")
        elif len(set(rows.values())) > 1:
            raise _Wrong(f"its operands have different numbers of rows: {rows}")

    def _check_types(self, operation: Operation, kind: OperationKind) -> None:
        for role, operand in operation.inputs.items():
            dtype = self.buffers[operand.buffer].dtype
            wants_integers = role in _INPUTS
            if wants_integers != (dtype == "int32"):
                raise _Wrong(f"its {role} '{operand.buffer}' is {dtype}")
            if dtype == "int8_group32" and (operation.kind, role) != ("linear", "x"):
                raise _Wrong(f"its {role} '{operand.buffer}' is {dtype}, which only the x of a linear may be")
        for role, operand in operation.outputs.items():
            dtype = self.buffers[operand.buffer].dtype
            if dtype == "int32":
                raise _Wrong(f"its {role} '{operand.buffer}' is {dtype}")
            if dtype == "int8_group32":
                gated = operation.kind != "linear" or "activation" in operation.attributes
                if role != "y" or operation.kind not in _MAY_WRITE_INT8 or not gated:
                    raise _Wrong(f"its {role} '{operand.buffer}' cannot be {dtype}")
            elif operation.kind == "quantize":
                raise _Wrong(f"its {role} '{operand.buffer}' is {dtype} instead of int8_group32")

    def _check_columns(self, operation: Operation) -> None:
        columns = {role: operand.num_columns for role, operand in operation.inputs.items()}
        columns |= {role: operand.num_columns for role, operand in operation.outputs.items()}
        shapes = {role: self.weights[name].shape for role, name in operation.weights.items()}
        sizes = SizesOfOperation(columns, shapes, operation.attributes)
        rule: Callable[[SizesOfOperation], Iterable[str]] = COLUMN_RULES[operation.kind]
        for problem in rule(sizes):
            raise _Wrong(problem)

    def _check_cache(self, operation: Operation) -> None:
        layer = operation.attributes.get("layer")
        if not isinstance(layer, int):
            return
        if operation.kind == "attention":
            columns = int(operation.attributes["num_kv_heads"] or 0) * int(operation.attributes["head_dim"] or 0)
            if self.cached_columns.get(layer) != columns:
                raise _Wrong(
                    f"it reads {columns} columns from the cache of layer {layer}, "
                    f"where {self.cached_columns.get(layer, 0)} were written"
                )
        else:
            if layer in self.cached_columns:
                raise _Wrong(f"the cache of layer {layer} is written twice")
            self.cached_columns[layer] = operation.inputs["key"].num_columns


def _check_roles(what: str, given: Mapping[str, object], declared: tuple[str, ...]) -> None:
    """Every role without `?` must be there, and none that is not declared."""
    for role in declared:
        if not role.endswith("?") and role not in given:
            raise _Wrong(f"it has no {what} '{role}'")
    known = [role.removesuffix("?") for role in declared]
    for role in given:
        if role not in known:
            raise _Wrong(f"it has the unknown {what} '{role}'")


def _check_attribute(name: str, value: AttributeValue) -> None:
    if name == "activation":
        if value not in _ACTIVATIONS:
            raise _Wrong(f"its activation is {value!r}; known are {' and '.join(_ACTIVATIONS)}")
    elif name == "normalize":
        if not isinstance(value, bool):
            raise _Wrong(f"its normalize is {value!r} instead of true or false")
    elif name in _INTEGER_ATTRIBUTES:
        optional = name == "sliding_window" and value is None
        minimum = 0 if name == "layer" else 1
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
            raise _Wrong(f"its {name} is {value!r}")
    elif name == "soft_cap" and value is None:
        return
    elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Wrong(f"its {name} is {value!r} instead of a number")


def _check_weight(weight: Weight) -> None:
    encoding = WEIGHT_FORMATS.get(weight.format)
    if encoding is None:
        raise _Wrong(f"the weight '{weight.name}' has the unknown format '{weight.format}'")
    if len(weight.shape) not in (1, 2) or min(weight.shape) < 1:
        raise _Wrong(f"the weight '{weight.name}' has the shape {list(weight.shape)}")
    if not encoding.fits(weight.shape[-1]):
        raise _Wrong(
            f"the weight '{weight.name}' of shape {list(weight.shape)} cannot be made of {weight.format} blocks"
        )
    if weight.transform not in _TRANSFORMS:
        raise _Wrong(f"the weight '{weight.name}' has the unknown transform '{weight.transform}'")
    num_rows = sum(part.num_rows for part in weight.parts)
    if weight.parts and num_rows != weight.shape[0]:
        raise _Wrong(f"the parts of the weight '{weight.name}' have {num_rows} rows instead of {weight.shape[0]}")
