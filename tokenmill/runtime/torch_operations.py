"""The operations of a `Program` in torch: one function for each kind, which prepares an operation once and gives
what runs it in each step. Numbers go through `tokenmill.ops` and an attention backend, as in the torch layers.

Values of an `int8_group32` buffer are kept as the floats that the integers stand for. Called by `torch_program`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch.nn import functional

from tokenmill.attention.base import AttentionBackend, AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.ops.activation import gated_activation
from tokenmill.ops.linear import PackedWeight, StreamedWeight, linear, pack_linear_weight
from tokenmill.ops.moe import ExpertMatrix, ExpertWeights, route, run_experts
from tokenmill.ops.rms_norm import add_rms_norm, rms_norm
from tokenmill.ops.rope import apply_rope
from tokenmill.program.program import AttributeValue, Buffer, BufferDtype, Operand, Operation

GROUP_SIZE = 32
"""Columns of an `int8_group32` buffer that share a scale."""

Values: TypeAlias = dict[str, torch.Tensor]
"""What the buffers hold now, [rows, columns] each."""


@dataclass(slots=True)
class TorchStep:
    """What a step brings besides token ids and positions.

    Args:
        attention: rows, block tables, lengths.
        caches: keys and values of each layer.
        written: keys and values of this step by layer, [T, G, D] each, between `write_cache` and `attention`.
        rotations: cosines and signed sines by operand, as `apply_rope` takes them.
    """

    attention: AttentionMetadata
    caches: tuple[LayerCache, ...]
    written: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    rotations: dict[Operand, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


Execute: TypeAlias = Callable[[Values, TorchStep], None]
Read: TypeAlias = Callable[[Values], torch.Tensor]
Write: TypeAlias = Callable[[Values, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Preparation:
    """What operations are prepared with.

    Args:
        buffers: of the program, by name, inputs and output included.
        weights: decoded, by name.
        backend: what attention calls.
        batch_invariant: give a token the same bits in any company.
    """

    buffers: Mapping[str, Buffer]
    weights: Mapping[str, torch.Tensor]
    backend: AttentionBackend
    batch_invariant: bool = False

    def reader(self, operand: Operand) -> Read:
        """Gives the operand's columns."""
        name, first, end = operand.buffer, operand.first_column, operand.first_column + operand.num_columns
        if operand.num_columns == self.buffers[name].columns:
            return lambda values: values[name]
        return lambda values: values[name][:, first:end]

    def writer(self, operand: Operand) -> Write:
        """Takes the operand's columns, and brings them to the buffer's type."""
        buffer, name = self.buffers[operand.buffer], operand.buffer
        convert = _conversion(buffer.dtype)
        if operand.num_columns == buffer.columns:

            def write_all(values: Values, y: torch.Tensor) -> None:
                values[name] = convert(y)

            return write_all
        first, end = operand.first_column, operand.first_column + operand.num_columns

        def write_part(values: Values, y: torch.Tensor) -> None:
            y = convert(y)
            if name not in values:
                values[name] = y.new_empty(y.shape[0], buffer.columns)
            values[name][:, first:end] = y

        return write_part

    def compute_dtype(self, operand: Operand) -> torch.dtype:
        """The type that the operand's values are computed with."""
        return torch.bfloat16 if self.buffers[operand.buffer].dtype == "bfloat16" else torch.float32


def _conversion(dtype: BufferDtype) -> Callable[[torch.Tensor], torch.Tensor]:
    if dtype == "int8_group32":
        return round_to_int8
    torch_dtype = getattr(torch, dtype)
    return lambda y: y.to(torch_dtype)


def round_to_int8(x: torch.Tensor) -> torch.Tensor:
    """x [T, C] with each group of 32 columns rounded to 255 levels between minus and plus its largest magnitude."""
    num_columns = x.shape[1]
    padded = functional.pad(x.float(), (0, -num_columns % GROUP_SIZE))
    groups = padded.view(padded.shape[0], padded.shape[1] // GROUP_SIZE, GROUP_SIZE)
    scales = groups.abs().amax(dim=-1, keepdim=True) / 127.0
    levels = torch.round(groups / scales.masked_fill(scales == 0.0, 1.0))
    rounded: torch.Tensor = (levels * scales).flatten(1)[:, :num_columns]
    return rounded


def _heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[T, heads * D] to [T, heads, D]."""
    return x.view(x.shape[0], x.shape[1] // head_dim, head_dim)


def _number(value: AttributeValue) -> float:
    assert isinstance(value, int | float), value
    return float(value)


def _integer(value: AttributeValue) -> int:
    assert isinstance(value, int), value
    return value


def _optional(value: AttributeValue) -> float | None:
    return None if value is None else _number(value)


# ---- rows in, rows out ---------------------------------------------------------------------------------------------


def _embedding(operation: Operation, prepared: Preparation) -> Execute:
    read, write = prepared.reader(operation.inputs["token_ids"]), prepared.writer(operation.outputs["y"])
    scale = _number(operation.attributes["scale"])
    table = prepared.weights[operation.weights["table"]].to(prepared.compute_dtype(operation.outputs["y"]))

    def execute(values: Values, step: TorchStep) -> None:
        rows = functional.embedding(read(values)[:, 0].long(), table)
        write(values, rows if scale == 1.0 else rows * scale)

    return execute


def _select_rows(operation: Operation, prepared: Preparation) -> Execute:
    read, index = prepared.reader(operation.inputs["x"]), prepared.reader(operation.inputs["row_index"])
    write = prepared.writer(operation.outputs["y"])
    return lambda values, step: write(values, read(values)[index(values)[:, 0].long()])


def _elementwise(
    compute: Callable[..., torch.Tensor], roles: tuple[str, ...]
) -> Callable[[Operation, Preparation], Execute]:
    """An operation without weights: `compute` of its inputs, then of its numbers."""

    def prepare(operation: Operation, prepared: Preparation) -> Execute:
        reads = [prepared.reader(operation.inputs[role]) for role in roles]
        write = prepared.writer(operation.outputs["y"])
        numbers = list(operation.attributes.values())
        return lambda values, step: write(values, compute(*(read(values) for read in reads), *numbers))

    return prepare


def _activate(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "silu":
        return functional.silu(x)
    assert name == "gelu_pytorch_tanh", name
    return functional.gelu(x, approximate="tanh")


def _cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.tanh(x / cap) * cap


def _gated_activation(operation: Operation, prepared: Preparation) -> Execute:
    gate, up = operation.inputs["gate"], operation.inputs["up"]
    activate = _gated(operation.attributes["activation"], prepared, gate)
    write = prepared.writer(operation.outputs["y"])
    size = gate.num_columns
    if gate.buffer == up.buffer and up.first_column == gate.first_column + size:
        read = prepared.reader(Operand(gate.buffer, gate.first_column, 2 * size))
        return lambda values, step: write(values, activate(read(values)))
    read_gate, read_up = prepared.reader(gate), prepared.reader(up)
    return lambda values, step: write(values, activate(torch.cat((read_gate(values), read_up(values)), dim=-1)))


def _gated(name: AttributeValue, prepared: Preparation, operand: Operand) -> Callable[[torch.Tensor], torch.Tensor]:
    assert isinstance(name, str)
    device = next(iter(prepared.weights.values())).device
    return gated_activation(name, device, prepared.compute_dtype(operand))


# ---- with weights --------------------------------------------------------------------------------------------------


def _linear(operation: Operation, prepared: Preparation) -> Execute:
    x = operation.inputs["x"]
    dtype = prepared.compute_dtype(x)
    read, write = prepared.reader(x), prepared.writer(operation.outputs["y"])
    weight = _prepared_weight(prepared.weights[operation.weights["weight"]].to(dtype), prepared.batch_invariant)
    bias = prepared.weights[operation.weights["bias"]].to(dtype) if "bias" in operation.weights else None
    residual = prepared.reader(operation.inputs["residual"]) if "residual" in operation.inputs else None
    name = operation.attributes.get("activation")
    activate = None if name is None else _gated(name, prepared, x)

    def execute(values: Values, step: TorchStep) -> None:
        y = linear(read(values), weight, bias)
        if activate is not None:
            y = activate(y)
        write(values, y if residual is None else residual(values) + y)

    return execute


def _prepared_weight(weight: torch.Tensor, batch_invariant: bool) -> torch.Tensor | PackedWeight | StreamedWeight:
    return pack_linear_weight(weight.contiguous(), batch_invariant=batch_invariant)


def _experts(operation: Operation, prepared: Preparation) -> Execute:
    x, attributes = operation.inputs["x"], operation.attributes
    read, logits = prepared.reader(x), prepared.reader(operation.inputs["router_logits"])
    write, top_k = prepared.writer(operation.outputs["y"]), _integer(attributes["top_k"])
    num_experts, name = _integer(attributes["num_experts"]), str(attributes["activation"])
    gate_up, down = (
        ExpertMatrix(weight.view(num_experts, -1, weight.shape[1]))
        for weight in (
            prepared.weights[operation.weights[role]].to(prepared.compute_dtype(x)) for role in ("gate_up", "down")
        )
    )
    weights = ExpertWeights(gate_up, down, name, batch_invariant=prepared.batch_invariant).prepared()
    normalize = bool(attributes["normalize"])

    def execute(values: Values, step: TorchStep) -> None:
        routing = route(logits(values), top_k, normalize=normalize)
        write(values, run_experts(read(values), routing, weights))

    return execute


def _add_bias(operation: Operation, prepared: Preparation) -> Execute:
    read, write = prepared.reader(operation.inputs["x"]), prepared.writer(operation.outputs["y"])
    bias = prepared.weights[operation.weights["bias"]].to(prepared.compute_dtype(operation.inputs["x"]))
    return lambda values, step: write(values, read(values) + bias)


def _rms_norm(operation: Operation, prepared: Preparation) -> Execute:
    read, write = prepared.reader(operation.inputs["x"]), prepared.writer(operation.outputs["y"])
    weight, eps = prepared.weights[operation.weights["weight"]], _number(operation.attributes["eps"])
    head_dim = operation.attributes.get("head_dim")
    if head_dim is None:
        return lambda values, step: write(values, rms_norm(read(values), weight, eps))
    size = _integer(head_dim)
    return lambda values, step: write(values, rms_norm(_heads(read(values), size), weight, eps).flatten(1))


def _add_rms_norm(operation: Operation, prepared: Preparation) -> Execute:
    read, residual = (prepared.reader(operation.inputs[role]) for role in ("x", "residual"))
    write, write_sum = (prepared.writer(operation.outputs[role]) for role in ("y", "sum"))
    weight, eps = prepared.weights[operation.weights["weight"]], _number(operation.attributes["eps"])

    def execute(values: Values, step: TorchStep) -> None:
        normalized, total = add_rms_norm(read(values), residual(values), weight, eps)
        write_sum(values, total)
        write(values, normalized)

    return execute


# ---- positions and the cache ---------------------------------------------------------------------------------------


def _rotation(operation: Operation, prepared: Preparation) -> Execute:
    positions, target = prepared.reader(operation.inputs["positions"]), operation.outputs["y"]
    frequencies = prepared.weights[operation.weights["frequencies"]].float()
    factor, write = _number(operation.attributes["factor"]), prepared.writer(target)

    def execute(values: Values, step: TorchStep) -> None:
        angles = positions(values).float() * frequencies  # [T, D / 2]
        cos, sin = angles.cos(), angles.sin()
        if factor != 1.0:
            cos, sin = cos * factor, sin * factor
        write(values, torch.cat((cos, sin), dim=-1))
        step.rotations[target] = _as_pairs(cos, sin)

    return execute


def _as_pairs(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, D / 2] each to [T, 1, D] each: cosines, and sines with the sign that the first half takes."""
    return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def _turn(x: torch.Tensor, operand: Operand, values: Values, step: TorchStep) -> torch.Tensor:
    """x [T, heads, D], turned by the rotation that the operand holds."""
    if operand not in step.rotations:
        half, first = operand.num_columns // 2, operand.first_column
        angles = values[operand.buffer]
        step.rotations[operand] = _as_pairs(angles[:, first : first + half], angles[:, first + half : first + 2 * half])
    return apply_rope(x, *step.rotations[operand])


def _rope(operation: Operation, prepared: Preparation) -> Execute:
    read, write = prepared.reader(operation.inputs["x"]), prepared.writer(operation.outputs["y"])
    rotation, head_dim = operation.inputs["rotation"], _integer(operation.attributes["head_dim"])

    def execute(values: Values, step: TorchStep) -> None:
        write(values, _turn(_heads(read(values), head_dim), rotation, values, step).flatten(1))

    return execute


def _write_cache(operation: Operation, prepared: Preparation) -> Execute:
    key, value = (prepared.reader(operation.inputs[role]) for role in ("key", "value"))
    layer = _integer(operation.attributes["layer"])

    def execute(values: Values, step: TorchStep) -> None:
        head_dim = step.caches[layer][0].shape[-1]
        step.written[layer] = _heads(key(values), head_dim), _heads(value(values), head_dim)

    return execute


def _rope_write_cache(operation: Operation, prepared: Preparation) -> Execute:
    query, key, value = (prepared.reader(operation.inputs[role]) for role in ("query", "key", "value"))
    write, rotation = prepared.writer(operation.outputs["y"]), operation.inputs["rotation"]
    layer, head_dim = (_integer(operation.attributes[name]) for name in ("layer", "head_dim"))
    query_norm, key_norm = (
        prepared.weights[operation.weights[role]] if role in operation.weights else None
        for role in ("query_norm", "key_norm")
    )
    eps = _number(operation.attributes.get("eps") or 0.0)

    def turned(x: torch.Tensor, norm: torch.Tensor | None, values: Values, step: TorchStep) -> torch.Tensor:
        x = _heads(x, head_dim)
        return _turn(x if norm is None else rms_norm(x, norm, eps), rotation, values, step)

    def execute(values: Values, step: TorchStep) -> None:
        step.written[layer] = turned(key(values), key_norm, values, step), _heads(value(values), head_dim)
        write(values, turned(query(values), query_norm, values, step).flatten(1))

    return execute


def _attention(operation: Operation, prepared: Preparation) -> Execute:
    attributes = operation.attributes
    window = attributes.get("sliding_window")
    spec = AttentionSpec(
        num_heads=_integer(attributes["num_heads"]),
        num_kv_heads=_integer(attributes["num_kv_heads"]),
        head_dim=_integer(attributes["head_dim"]),
        scale=_number(attributes["scale"]),
        sliding_window=None if window is None else _integer(window),
        soft_cap=_optional(attributes.get("soft_cap")),
    )
    read, write = prepared.reader(operation.inputs["query"]), prepared.writer(operation.outputs["y"])
    layer, backend = _integer(attributes["layer"]), prepared.backend

    def execute(values: Values, step: TorchStep) -> None:
        query = _heads(read(values), spec.head_dim)
        # The backend writes this step's keys and values itself, in the kernel that reads them where it has one.
        key, value = step.written.pop(layer)
        write(values, backend.forward(spec, query, key, value, step.caches[layer], step.attention).flatten(1))

    return execute


PREPARE: Mapping[str, Callable[[Operation, Preparation], Execute]] = MappingProxyType({
    "embedding": _embedding,
    "rotation": _rotation,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "quantize": _elementwise(lambda x: x, ("x",)),
    "linear": _linear,
    "experts": _experts,
        "add_bias": _add_bias,
    "rope": _rope,
    "write_cache": _write_cache,
    "rope_write_cache": _rope_write_cache,
    "attention": _attention,
    "activation": _elementwise(_activate, ("x",)),
    "gated_activation": _gated_activation,
    "add": _elementwise(torch.add, ("a", "b")),
    "multiply": _elementwise(torch.mul, ("a", "b")),
    "scale": _elementwise(torch.mul, ("x",)),
    "copy": _elementwise(torch.clone, ("x",)),
    "select_rows": _select_rows,
    "soft_cap": _elementwise(_cap, ("x",)),
})  # fmt: skip
"""By the operation's kind."""
