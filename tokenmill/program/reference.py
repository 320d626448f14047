"""Every operation of a program as it is defined, in plain torch and float32: what executors are tested against.

`run_program` walks a program over an arena of bytes, at the offsets of its memory plan if it has one, so that a plan
with buffers that overlap gives wrong logits here. Quantized activations are rounded as the executors do it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch.nn import functional

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.attention.reference import attend
from tokenmill.ops.kv_cache import write_kv_reference
from tokenmill.program.program import Buffer, Operand, Operation, Program

GROUP: Final = 32
"""Columns that share a scale in `int8_group32`."""


@dataclass(slots=True)
class _State:
    """A step: memory, weights and the cache."""

    buffers: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]
    metadata: AttentionMetadata
    caches: Sequence[LayerCache]
    dtypes: Mapping[str, str]
    operation: Operation = field(default_factory=lambda: Operation("", ""))

    def input(self, role: str) -> torch.Tensor:
        """[rows, columns] of an input."""
        return self._columns(self.operation.inputs[role])

    def weight(self, role: str) -> torch.Tensor:
        return self.weights[self.operation.weights[role]]

    def has(self, role: str) -> bool:
        return role in self.operation.inputs or role in self.operation.weights

    def number(self, name: str) -> float:
        value = self.operation.attributes[name]
        assert isinstance(value, int | float)
        return value

    def optional_number(self, name: str) -> float | None:
        return None if self.operation.attributes.get(name) is None else self.number(name)

    def integer(self, name: str) -> int:
        return int(self.number(name))

    def write(self, role: str, result: torch.Tensor) -> None:
        """Store an output, rounded to what its buffer can hold."""
        operand = self.operation.outputs[role]
        if self.dtypes[operand.buffer] == "int8_group32":
            result = round_to_int8(result)
        self._columns(operand).copy_(result)

    def _columns(self, operand: Operand) -> torch.Tensor:
        return self.buffers[operand.buffer][:, operand.first_column : operand.first_column + operand.num_columns]


def run_program(
    program: Program,
    weights: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
    metadata: AttentionMetadata,
    caches: Sequence[LayerCache],
) -> torch.Tensor:
    """One step.

    Args:
        program: lowered; its memory may be planned or not.
        weights: [shape] float32 of every weight, by name, transformed already.
        inputs: `token_ids` and `positions` [T], `row_index` [R].
        metadata: of the step.
        caches: of each layer; changed in place.

    Returns:
        Logits [R, vocab_size] float32.
    """
    sizes = {"tokens": inputs["token_ids"].shape[0], "rows": inputs["row_index"].shape[0]}
    buffers = _allocate(program, sizes)
    for name, tensor in inputs.items():
        buffers[name] = tensor[:, None]
    everything = (*program.inputs, *program.buffers, program.output)
    state = _State(buffers, weights, metadata, caches, {buffer.name: buffer.dtype for buffer in everything})
    for operation in program.operations:
        state.operation = operation
        DEFINITIONS[operation.kind](state)
    return buffers[program.output.name]


def _allocate(program: Program, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Memory for all buffers, filled with NaN. Planned ones are views of one arena."""
    arena = torch.full((program.arena_bytes // 4,), torch.nan)
    buffers = {}
    for buffer in (*program.buffers, program.output):
        num_rows = sizes[buffer.rows] if isinstance(buffer.rows, str) else buffer.rows
        shape = (num_rows, buffer.columns)
        if buffer.offset is None or _is_larger_here(buffer):
            buffers[buffer.name] = torch.full(shape, torch.nan)
        else:
            start = buffer.offset // 4
            buffers[buffer.name] = arena[start : start + num_rows * buffer.columns].view(shape)
    return buffers


def _is_larger_here(buffer: Buffer) -> bool:
    """Rounded values are kept as float32, which needs more than the plan gives to int8."""
    return buffer.dtype == "int8_group32"


def round_to_int8(x: torch.Tensor) -> torch.Tensor:
    """What `int8_group32` keeps of x [rows, columns]: each group's values in steps of a 127th of the largest."""
    num_columns = x.shape[1]
    groups = split(functional.pad(x, (0, -num_columns % GROUP)), GROUP)
    scale = groups.abs().amax(dim=-1, keepdim=True) / 127.0
    steps = torch.where(scale > 0, (groups / scale).round(), 0.0)
    return (steps * scale).flatten(1)[:, :num_columns]


def split(x: torch.Tensor, size: int) -> torch.Tensor:
    """[rows, columns] to [rows, columns / size, size]: heads, or groups."""
    return x.reshape(x.shape[0], -1, size)


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def activate(name: str, x: torch.Tensor) -> torch.Tensor:
    """`silu` or `gelu_pytorch_tanh`."""
    return functional.silu(x) if name == "silu" else functional.gelu(x, approximate="tanh")


def turn(x: torch.Tensor, rotation: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Each head's pairs (i, i + head_dim / 2) of x [T, heads * head_dim] by the angles of [T, head_dim]."""
    cos, sin = rotation[:, None, : head_dim // 2], rotation[:, None, head_dim // 2 :]
    x1, x2 = split(x, head_dim).chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(1)


def _embedding(state: _State) -> None:
    rows = state.weight("table")[state.input("token_ids")[:, 0].long()]
    state.write("y", rows * state.number("scale"))


def _rotation(state: _State) -> None:
    angles = state.input("positions").float() * state.weight("frequencies")
    state.write("y", torch.cat((angles.cos(), angles.sin()), dim=1) * state.number("factor"))


def _rms_norm(state: _State) -> None:
    x, head_dim = state.input("x"), state.optional_number("head_dim")
    if head_dim is not None:
        x = split(x, int(head_dim))
    state.write("y", normalize(x, state.weight("weight"), state.number("eps")).reshape(x.shape[0], -1))


def _add_rms_norm(state: _State) -> None:
    total = state.input("x") + state.input("residual")
    normalized = normalize(total, state.weight("weight"), state.number("eps"))
    state.write("sum", total)
    state.write("y", normalized)


def _linear(state: _State) -> None:
    product = state.input("x") @ state.weight("weight").T
    if state.has("bias"):
        product = product + state.weight("bias")
    if state.has("residual"):
        product = product + state.input("residual")
    activation = state.operation.attributes.get("activation")
    if activation is not None:
        gate, up = product.chunk(2, dim=1)
        product = activate(str(activation), gate) * up
    state.write("y", product)


def _rope(state: _State) -> None:
    state.write("y", turn(state.input("x"), state.input("rotation"), state.integer("head_dim")))


def _write_cache(state: _State) -> None:
    _store(state, state.input("key"), state.input("value"))


def _store(state: _State, key: torch.Tensor, value: torch.Tensor) -> None:
    keys, values = state.caches[state.integer("layer")]
    head_dim = keys.shape[-1]
    write_kv_reference(split(key, head_dim), split(value, head_dim), keys, values, state.metadata.slot_mapping)


def _rope_write_cache(state: _State) -> None:
    head_dim, rotation = state.integer("head_dim"), state.input("rotation")
    turned = {}
    for role in ("query", "key"):
        x = state.input(role)
        if state.has(f"{role}_norm"):
            heads = split(x, head_dim)
            x = normalize(heads, state.weight(f"{role}_norm"), state.number("eps")).flatten(1)
        turned[role] = turn(x, rotation, head_dim)
    _store(state, turned["key"], state.input("value"))
    state.write("y", turned["query"])


def _attention(state: _State) -> None:
    window = state.optional_number("sliding_window")
    spec = AttentionSpec(
        num_heads=state.integer("num_heads"),
        num_kv_heads=state.integer("num_kv_heads"),
        head_dim=state.integer("head_dim"),
        scale=state.number("scale"),
        sliding_window=None if window is None else int(window),
        soft_cap=state.optional_number("soft_cap"),
    )
    query = split(state.input("query"), spec.head_dim)
    key_cache, value_cache = state.caches[state.integer("layer")]
    metadata, results, start = state.metadata, [], 0
    for row, (query_len, kv_len) in enumerate(zip(metadata.query_lens, metadata.kv_lens_host, strict=True)):
        blocks = metadata.block_tables[row, : -(-kv_len // key_cache.shape[1])].long()
        keys, values = (cache[blocks].flatten(0, 1)[:kv_len] for cache in (key_cache, value_cache))
        results.append(attend(spec, query[start : start + query_len], keys, values))
        start += query_len
    state.write("y", torch.cat(results).flatten(1))


def _gated_activation(state: _State) -> None:
    name = str(state.operation.attributes["activation"])
    state.write("y", activate(name, state.input("gate")) * state.input("up"))


def _experts(state: _State) -> None:
    """One token and expert after the other."""
    x, top_k = state.input("x"), state.integer("top_k")
    num_experts, name = state.integer("num_experts"), str(state.operation.attributes["activation"])
    gate_up, down = (state.weight(role).chunk(num_experts) for role in ("gate_up", "down"))
    shares, experts = state.input("router_logits").softmax(dim=1).topk(top_k, dim=1)
    if state.operation.attributes["normalize"]:
        shares = shares / shares.sum(dim=1, keepdim=True)
    result = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for share, expert in zip(shares[token], experts[token].tolist(), strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            result[token] += share * (down[expert] @ (activate(name, gate) * up))
    state.write("y", result)


def _activation(state: _State) -> None:
    state.write("y", activate(str(state.operation.attributes["activation"]), state.input("x")))


def _select_rows(state: _State) -> None:
    state.write("y", state.input("x")[state.input("row_index")[:, 0].long()])


def _soft_cap(state: _State) -> None:
    cap = state.number("cap")
    state.write("y", torch.tanh(state.input("x") / cap) * cap)


DEFINITIONS: Final[Mapping[str, Callable[[_State], None]]] = {
    "embedding": _embedding,
    "rotation": _rotation,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "quantize": lambda state: state.write("y", state.input("x")),
    "linear": _linear,
    "add_bias": lambda state: state.write("y", state.input("x") + state.weight("bias")),
    "rope": _rope,
    "write_cache": _write_cache,
    "rope_write_cache": _rope_write_cache,
    "attention": _attention,
    "experts": _experts,
    "activation": _activation,
    "gated_activation": _gated_activation,
    "add": lambda state: state.write("y", state.input("a") + state.input("b")),
    "multiply": lambda state: state.write("y", state.input("a") * state.input("b")),
    "scale": lambda state: state.write("y", state.input("x") * state.number("factor")),
    "copy": lambda state: state.write("y", state.input("x")),
    "select_rows": _select_rows,
    "soft_cap": _soft_cap,
}
"""What each kind of operation does."""
