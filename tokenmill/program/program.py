"""`Program`: a model as a flat list of operations over buffers and packed weights.

The builder writes it (`builder/lowering.py`), an engine directory stores it (`package.py`), and the executors of
`runtime/` walk it; no model code is needed to run one. One program serves every step: the sizes of a step are the
symbols of `Dim`. Operations come in an order that may be executed as it is. What the list does not say (the paged
cache, block tables, lengths) belongs to the step and reaches `write_cache`, `rope_write_cache` and `attention` besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

Dim: TypeAlias = int | Literal["tokens", "rows"]
"""A size: a number, the tokens of the step T, or the tokens whose logits are wanted R."""

BufferDtype: TypeAlias = Literal["float32", "bfloat16", "int32", "int8_group32"]
"""Type of a buffer. `int8_group32`: signed 8-bit values with one float32 scale, and one float32 product of scale and
sum of values, for each token and group of 32 columns (the last group may be short); only `linear` reads it."""

AttributeValue: TypeAlias = int | float | str | bool | None


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory for an intermediate result, [dim, columns]; or an input or output of the program.

    Args:
        name: unique in the program.
        rows: the first dimension.
        columns: the second one.
        dtype: of the values.
        offset: bytes from the start of the arena at the step's largest size; None before memory is planned, and for
            inputs and outputs of the program.
    """

    name: str
    rows: Dim
    columns: int
    dtype: BufferDtype = "float32"
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Operand:
    """Columns of a buffer: `first_column` to `first_column + num_columns - 1`."""

    buffer: str
    first_column: int
    num_columns: int


@dataclass(frozen=True, slots=True)
class WeightPart:
    """One checkpoint tensor inside a weight: its Hugging Face name, and the output features it gives."""

    name: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant. Linear weights are [out_features, in_features] in the order of `parts`.

    Args:
        name: unique in the program; key of its bytes in the engine's weight file.
        shape: logical shape.
        format: how its values are encoded (`formats.py`): `float32`, `bfloat16`, `int8_channel`, `int8_group32`,
            `q4_0`, `q4_1`, `q5_0`, `q5_1`, `q8_0`, `q2_k` to `q6_k`.
        layout: how the encoded values lie in memory: `rows`, or a packing that a linear kernel reads.
        parts: the checkpoint tensors that it is made of, for refit; empty for computed constants.
        transform: what is done to the parts' values: `none`, or `add_one` (norm weights of Gemma).
    """

    name: str
    shape: tuple[int, ...]
    format: str = "float32"
    layout: str = "rows"
    parts: tuple[WeightPart, ...] = ()
    transform: str = "none"


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of the program; see `OPERATIONS` for what each kind reads, writes and is told.

    Args:
        kind: a key of `OPERATIONS`.
        name: where it comes from, such as `model.layers.0.self_attn.qkv_proj`; unique.
        inputs, outputs: by role.
        weights: names of weights, by role.
        attributes: numbers and names.
    """

    kind: str
    name: str
    inputs: Mapping[str, Operand] = field(default_factory=dict)
    outputs: Mapping[str, Operand] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OperationKind:
    """Roles of one kind of operation. A role that ends with `?` may be missing.

    Args:
        meaning: what it computes.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]
    attributes: tuple[str, ...]
    meaning: str


OPERATIONS: Final[Mapping[str, OperationKind]] = {
    "embedding": OperationKind(
        ("token_ids",), ("y",), ("table",), ("scale",), "y[t] = table[token_ids[t]] * scale; the table may be quantized"
    ),
    "rotation": OperationKind(
        ("positions",),
        ("y",),
        ("frequencies",),
        ("factor",),
        "y[t] = cos(positions[t] * frequencies) * factor in the first head_dim / 2 columns, sin likewise in the others",
    ),
    "rms_norm": OperationKind(
        ("x",),
        ("y",),
        ("weight",),
        ("eps", "head_dim?"),
        "y = x / sqrt(mean(x^2) + eps) * weight over the columns, or over each head_dim of them; y may be int8_group32",
    ),
    "add_rms_norm": OperationKind(
        ("x", "residual"),
        ("y", "sum"),
        ("weight",),
        ("eps",),
        "sum = x + residual, y = rms_norm(sum); sum may be the memory of residual; y may be int8_group32",
    ),
    "quantize": OperationKind(("x",), ("y",), (), (), "y = x as int8_group32"),
    "linear": OperationKind(
        ("x", "residual?"),
        ("y",),
        ("weight", "bias?"),
        ("activation?",),
        "y = x weight^T (+ bias) (+ residual); y may be the memory of residual. With `activation`, the weight's first "
        "half of rows is the gate: y = activation(gate) * up, and y may be int8_group32",
    ),
    "add_bias": OperationKind(("x",), ("y",), ("bias",), (), "y = x + bias; y may be x; `linear` does it by itself"),
    "rope": OperationKind(
        ("x", "rotation"), ("y",), (), ("head_dim",), "each head's pairs (i, i + head_dim / 2) turned; y may be x"
    ),
    "write_cache": OperationKind(("key", "value"), (), (), ("layer",), "to the step's slots of the layer's cache"),
    "rope_write_cache": OperationKind(
        ("query", "key", "value", "rotation"),
        ("y",),
        ("query_norm?", "key_norm?"),
        ("layer", "head_dim", "eps?"),
        "y = rope(rms_norm(query)), rope(rms_norm(key)) and value to the cache; norms over heads, if there are weights",
    ),
    "attention": OperationKind(
        ("query",),
        ("y",),
        (),
        ("layer", "num_heads", "num_kv_heads", "head_dim", "scale", "sliding_window?", "soft_cap?"),
        "causal attention over the layer's paged cache, which holds this step's keys and values already",
    ),
    "experts": OperationKind(
        ("x", "router_logits"),
        ("y",),
        ("gate_up", "down"),
        ("num_experts", "top_k", "normalize", "activation"),
        "y = sum of share_e * down_e (activation(gate_e x) * up_e x) over the top_k experts e of the largest shares in "
        "softmax(router_logits), which are divided by their sum if normalize; gate_up is [num_experts * 2 I, H], gate "
        "before up of each expert, down is [num_experts * H, I]",
    ),
    "activation": OperationKind(("x",), ("y",), (), ("activation",), "y = silu(x) or gelu_pytorch_tanh(x)"),
    "gated_activation": OperationKind(
        ("gate", "up"), ("y",), (), ("activation",), "y = activation(gate) * up; y may be int8_group32"
    ),
    "add": OperationKind(("a", "b"), ("y",), (), (), "y = a + b"),
    "multiply": OperationKind(("a", "b"), ("y",), (), (), "y = a * b"),
    "scale": OperationKind(("x",), ("y",), (), ("factor",), "y = x * factor"),
    "copy": OperationKind(("x",), ("y",), (), (), "y = x"),
    "select_rows": OperationKind(("x", "row_index"), ("y",), (), (), "y[r] = x[row_index[r]]"),
    "soft_cap": OperationKind(("x",), ("y",), (), ("cap",), "y = cap * tanh(x / cap)"),
}
"""Every kind of operation: the instruction set of the executors."""


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled model.

    Args:
        inputs: `token_ids`, `positions` [tokens] and `row_index` [rows], int32 each with one column.
        output: the logits, [rows, vocab_size] float32.
        buffers: all others.
        weights: all constants.
        operations: in order of execution.
        arena_bytes: memory for the buffers at the largest step; 0 before memory is planned.
    """

    inputs: tuple[Buffer, ...]
    output: Buffer
    buffers: tuple[Buffer, ...]
    weights: tuple[Weight, ...]
    operations: tuple[Operation, ...]
    arena_bytes: int = 0
