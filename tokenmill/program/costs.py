"""What each operation of a program moves and computes in a step of a given size, from shapes alone.

`tokenmill inspect` prints it as a table, the picture of a build shows it beside every node, benchmarks compare measured
times with it. Bytes count every operand once, as if caches held nothing between operations and everything within one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from tokenmill.program.formats import WEIGHT_FORMATS, rows_nbytes
from tokenmill.program.program import AttributeValue, BufferDtype, Dim, Operand, Program, Weight

_FLOPS_PER_VALUE: Final[Mapping[str, int]] = MappingProxyType({
    "activation": 4, "add": 1, "add_bias": 1, "add_rms_norm": 5, "gated_activation": 5, "multiply": 1, "quantize": 3,
    "rms_norm": 4, "rope": 3, "rope_write_cache": 3, "rotation": 2, "scale": 1, "soft_cap": 3,
})  # fmt: skip
"""Floating-point operations for each value of the output, of kinds that compute value by value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """A step, as costs see it.

    Args:
        num_tokens: computed, over all sequences.
        num_rows: logits wanted.
        num_sequences: with as many tokens each.
        context_len: cached tokens of each sequence at the end of the step.
        cache_nbytes: of one cached number.
    """

    num_tokens: int
    num_rows: int
    num_sequences: int = 1
    context_len: int
    cache_nbytes: int = 4

    def size(self, dim: Dim) -> int:
        """The number that a dimension is."""
        return {"tokens": self.num_tokens, "rows": self.num_rows}[dim] if isinstance(dim, str) else dim


@dataclass(frozen=True, slots=True)
class Block:
    """Some columns of a value: [rows, columns]."""

    rows: Dim
    columns: int
    dtype: BufferDtype

    def nbytes(self, step: StepSize) -> int:
        """In memory; `int8_group32` with its scales and sums."""
        num_rows = step.size(self.rows)
        if self.dtype == "int8_group32":
            return num_rows * (self.columns + 8 * -(-self.columns // 32))
        return num_rows * self.columns * (2 if self.dtype == "bfloat16" else 4)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one operation, or of several.

    Args:
        weight_bytes: read of weights.
        activation_bytes: read and written of values, and of the cache.
        flops: floating-point or integer operations, a multiplication and an addition counted as two.
    """

    weight_bytes: int = 0
    activation_bytes: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Everything that is moved."""
        return self.weight_bytes + self.activation_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
            self.flops + other.flops,
        )


def operation_cost(
    kind: str,
    inputs: Mapping[str, Block],
    outputs: Mapping[str, Block],
    weights: Mapping[str, Weight],
    attributes: Mapping[str, AttributeValue],
    step: StepSize,
) -> Cost:
    """The cost of one operation, given what it reads and writes by role."""
    weight_bytes = sum(_weight_nbytes(role, weight, inputs, step) for role, weight in weights.items())
    activation_bytes = sum(block.nbytes(step) for block in (*inputs.values(), *outputs.values()))
    if kind == "select_rows":  # reads no other rows
        activation_bytes = 2 * outputs["y"].nbytes(step) + inputs["row_index"].nbytes(step)
    num_values = sum(step.size(block.rows) * block.columns for role, block in outputs.items() if role == "y")
    flops = _FLOPS_PER_VALUE.get(kind, 0) * num_values
    if kind == "linear":
        out_features, in_features = weights["weight"].shape
        flops = 2 * step.size(inputs["x"].rows) * out_features * in_features
    elif kind == "experts":
        cost = _experts_cost(weights, attributes, step.size(inputs["x"].rows))
        weight_bytes, flops = cost.weight_bytes, cost.flops
    elif kind == "attention":
        pairs = _num_pairs(step, attributes.get("sliding_window"))
        num_heads, num_kv_heads, head_dim = (_integer(attributes, name) for name in _HEADS)
        flops = 4 * pairs * num_heads * head_dim
        activation_bytes += (
            2 * _num_cached(step, attributes.get("sliding_window")) * num_kv_heads * head_dim * step.cache_nbytes
        )
    elif kind in ("write_cache", "rope_write_cache"):
        num_columns = inputs["key"].columns + inputs["value"].columns
        activation_bytes += step.size(inputs["key"].rows) * num_columns * step.cache_nbytes
    return Cost(weight_bytes, activation_bytes, flops)


def _experts_cost(weights: Mapping[str, Weight], attributes: Mapping[str, AttributeValue], num_tokens: int) -> Cost:
    """Products of each token with its experts, which are read once if any token chose them, as if by chance."""
    num_experts, top_k = _integer(attributes, "num_experts"), _integer(attributes, "top_k")
    chosen = 1.0 - (1.0 - top_k / num_experts) ** num_tokens
    num_values = sum(math.prod(weight.shape) for weight in weights.values()) // num_experts
    weight_bytes = sum(rows_nbytes(weight.format, weight.shape) for weight in weights.values())
    return Cost(weight_bytes=round(weight_bytes * chosen), flops=2 * num_tokens * top_k * num_values)


_HEADS: Final = ("num_heads", "num_kv_heads", "head_dim")


def _integer(attributes: Mapping[str, AttributeValue], name: str) -> int:
    value = attributes[name]
    assert isinstance(value, int)
    return value


def _weight_nbytes(role: str, weight: Weight, inputs: Mapping[str, Block], step: StepSize) -> int:
    if role == "table":  # one row for each token
        return step.size(inputs["token_ids"].rows) * WEIGHT_FORMATS[weight.format].row_nbytes(weight.shape[1])
    return rows_nbytes(weight.format, weight.shape)


def _tokens_per_sequence(step: StepSize) -> int:
    return -(-step.num_tokens // step.num_sequences)


def _num_pairs(step: StepSize, window: AttributeValue) -> int:
    """Pairs of a query and a key that it sees, over all sequences."""
    num_new = _tokens_per_sequence(step)
    lens: Iterable[int] = range(step.context_len - num_new + 1, step.context_len + 1)
    limit = window if isinstance(window, int) else step.context_len
    return step.num_sequences * sum(min(length, limit) for length in lens)


def _num_cached(step: StepSize, window: AttributeValue) -> int:
    """Cached tokens that are read, over all sequences."""
    limit = window + _tokens_per_sequence(step) - 1 if isinstance(window, int) else step.context_len
    return step.num_sequences * min(step.context_len, limit)


@dataclass(frozen=True, slots=True)
class OperationRow:
    """One line of the table of a program.

    Args:
        name: of the operation, or what several have in common.
        kind: of it.
        count: operations in the line.
        shape: of the output, such as `[tokens, 576]`; of several, the most frequent one.
        formats: of the weights.
        cost: of all.
        microseconds: measured, of all; None: not measured.
    """

    name: str
    kind: str
    count: int
    shape: str
    formats: str
    cost: Cost
    microseconds: float | None


def operation_rows(
    program: Program, step: StepSize, times: Mapping[str, float] | None = None
) -> tuple[OperationRow, ...]:
    """A line for each operation, in order.

    Args:
        program: what to list.
        step: the size that costs are for.
        times: microseconds by the operation's name.
    """
    buffers = {buffer.name: buffer for buffer in (*program.inputs, *program.buffers, program.output)}
    weights = {weight.name: weight for weight in program.weights}

    def blocks(operands: Mapping[str, Operand]) -> dict[str, Block]:
        return {
            role: Block(buffers[one.buffer].rows, one.num_columns, buffers[one.buffer].dtype)
            for role, one in operands.items()
        }

    rows = []
    for operation in program.operations:
        used = {role: weights[name] for role, name in operation.weights.items()}
        outputs = blocks(operation.outputs)
        cost = operation_cost(operation.kind, blocks(operation.inputs), outputs, used, operation.attributes, step)
        shape = "".join(
            f"[{one.rows}, {one.columns}]{_suffix(one.dtype)}" for role, one in outputs.items() if role == "y"
        )
        formats = "+".join(dict.fromkeys(weight.format for weight in used.values() if len(weight.shape) > 1))
        microseconds = None if times is None else times.get(operation.name)
        rows.append(OperationRow(operation.name, operation.kind, 1, shape, formats, cost, microseconds))
    return tuple(rows)


def _suffix(dtype: BufferDtype) -> str:
    return "" if dtype == "float32" else f" {dtype}"


def rows_by_layer_part(rows: Sequence[OperationRow]) -> tuple[OperationRow, ...]:
    """The same with one line for all layers' operations of a kind and name: `model.layers.*.mlp.gate_up_proj`."""
    groups: dict[tuple[str, str, str], list[OperationRow]] = {}
    for row in rows:
        name = ".".join("*" if part.isdigit() else part for part in row.name.split("."))
        groups.setdefault((name, row.kind, row.formats), []).append(row)
    return tuple(_total(name, kind, formats, group) for (name, kind, formats), group in groups.items())


def _total(name: str, kind: str, formats: str, group: Sequence[OperationRow]) -> OperationRow:
    shapes = Counter(row.shape for row in group)
    measured = [row.microseconds for row in group if row.microseconds is not None]
    return OperationRow(
        name,
        kind,
        len(group),
        shapes.most_common(1)[0][0],
        formats,
        sum((row.cost for row in group), Cost()),
        math.fsum(measured) if measured else None,
    )
