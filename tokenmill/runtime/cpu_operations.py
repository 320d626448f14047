"""From the operations of a `Program` to rows of the CPU's op list: which kernel, with which addresses and sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

import torch

from tokenmill.attention.base import LayerCache
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.ops.cpu.activation import activation_op
from tokenmill.ops.cpu.attention import AttentionOp, attention, attention_combine, partial_bytes
from tokenmill.ops.cpu.attention_arguments import scratch_bytes
from tokenmill.ops.cpu.cache_layout import CacheLocation
from tokenmill.ops.cpu.elementwise import elementwise, elementwise_arguments
from tokenmill.ops.cpu.embedding import embedding, embedding_arguments
from tokenmill.ops.cpu.jit import NativeFunction
from tokenmill.ops.cpu.layout import GROUP_SIZE, int8_group32_bytes
from tokenmill.ops.cpu.linear_float import SCRATCH_BYTES as FLOAT_SCRATCH_BYTES
from tokenmill.ops.cpu.linear_float import LinearFloatOp, linear_float
from tokenmill.ops.cpu.linear_int8 import SCRATCH_BYTES, Activations, Matrix, linear_arguments, linear_kernel
from tokenmill.ops.cpu.norm import rms_norm, rms_norm_arguments
from tokenmill.ops.cpu.packing import FORMATS
from tokenmill.ops.cpu.quantize import quantize, quantize_arguments
from tokenmill.ops.cpu.rope import RopeOp, rope_write_cache, rotation, rotation_arguments
from tokenmill.ops.cpu.threads import OpList
from tokenmill.program.program import AttributeValue, Operand, Operation
from tokenmill.runtime.cpu_experts import ExpertResources, expert_ops
from tokenmill.runtime.cpu_memory import ProgramMemory
from tokenmill.runtime.cpu_weights import CpuWeights
from tokenmill.runtime.kernel_choices import KernelChoices
from tokenmill.runtime.program_parts import CacheShape
from tokenmill.runtime.step_arrays import StepArrays


class Op(NamedTuple):
    """An entry of the op list. Arguments that are functions stand for their addresses."""

    kernel: NativeFunction
    arguments: tuple[int | NativeFunction, ...]
    barrier: bool = True

    @property
    def functions(self) -> list[NativeFunction]:
        """All that must be compiled before the op is run."""
        return [self.kernel, *(one for one in self.arguments if isinstance(one, NativeFunction))]

    def append_to(self, ops: OpList) -> None:
        """Make it the next entry; what is not compiled yet is compiled now."""
        numbers = (one.address if isinstance(one, NativeFunction) else one for one in self.arguments)
        ops.append(self.kernel, *numbers, barrier=self.barrier)


@dataclass(frozen=True, slots=True)
class StepPlaces:
    """What is fixed about all steps.

    Args:
        arrays: the step's integers.
        step: address of the step's rows, see `ops.cpu.cache_layout.STEP_SIZE`.
        caches: keys and values of each layer in the kernels' layout.
        shapes: heads of each layer's cache.
        num_threads: that need scratch memory.
        deterministic: compute a token in the same way in every batch.
    """

    arrays: StepArrays
    step: int
    caches: tuple[LayerCache, ...]
    shapes: tuple[CacheShape, ...]
    num_threads: int
    deterministic: bool = False

    def cache(self, layer: int) -> CacheLocation:
        """Where a layer's cache is."""
        keys, values = self.caches[layer]
        is_bfloat16 = keys.dtype == torch.bfloat16
        stride = keys.stride(0) * keys.itemsize
        tokens_per_block = self.arrays.tokens_per_block
        return CacheLocation(keys.data_ptr(), values.data_ptr(), stride, is_bfloat16, tokens_per_block, self.step)


class OpWriter:
    """Writes ops.

    Args:
        memory: where the buffers are.
        weights: brought to memory as operations ask for them.
        places: what is fixed about all steps.
        choices: variants of kernels.
    """

    def __init__(
        self, memory: ProgramMemory, weights: CpuWeights, places: StepPlaces, choices: KernelChoices | None = None
    ) -> None:
        self.memory = memory
        self.weights = weights
        self.places = places
        self.choices = choices or KernelChoices()
        self._scratch: dict[str, tuple[int, int]] = {}

    def write(self, operation: Operation, *, one: bool) -> list[Op]:
        """The ops of an operation.

        Args:
            operation: of the program.
            one: for steps in which it computes one token (or row), else for several.

        Raises:
            UnsupportedFeatureError: there is no kernel for it.
        """
        if operation.kind not in _TRANSLATIONS:
            raise _no_kernel(operation)
        return list(_TRANSLATIONS[operation.kind](self, operation, one))

    def place(self, operand: Operand) -> tuple[int, int]:
        """Address and stride of an operand in a buffer of 4-byte values."""
        return self.memory.address(operand), self.memory.stride(operand)

    def scratch(self, use: str, num_bytes: int) -> int:
        """Memory of at least so many bytes that ops of one use share."""
        if self._scratch.get(use, (0, 0))[1] < num_bytes:
            self._scratch[use] = self.memory.reserve(num_bytes), num_bytes
        return self._scratch[use][0]

    def floats(self, operation: Operation, role: str) -> int:
        """Address of a weight as float32; 0 if the operation has none in this role."""
        return self.weights.floats(operation.weights[role]) if role in operation.weights else 0


Translation: TypeAlias = Callable[[OpWriter, Operation, bool], Iterator[Op]]


def _number(value: AttributeValue) -> float:
    assert isinstance(value, int | float), value
    return float(value)


def _integer(operation: Operation, name: str) -> int:
    value = operation.attributes[name]
    assert isinstance(value, int), value
    return value


def _text(value: AttributeValue) -> str:
    assert isinstance(value, str), value
    return value


def _embedding(writer: OpWriter, operation: Operation, one: bool) -> Iterator[Op]:
    name, y = operation.weights["table"], operation.outputs["y"]
    table = writer.weights[name]
    num_rows, columns = table.shape
    address, packed = writer.weights.table(name)
    arguments = embedding_arguments(
        token_ids=writer.memory.address(operation.inputs["token_ids"]),
        table=address,
        table_format=table.format,
        num_rows=num_rows,
        columns=columns,
        output=writer.place(y),
        packed=packed,
        scale=_number(operation.attributes["scale"]),
    )
    yield Op(embedding, arguments)


# ---- norms and maps --------------------------------------------------------------------------------------------------


def _rms_norm(writer: OpWriter, operation: Operation, one: bool) -> Iterator[Op]:
    x, y = operation.inputs["x"], operation.outputs["y"]
    residual, total = operation.inputs.get("residual"), operation.outputs.get("sum")
    head_dim = operation.attributes.get("head_dim")
    quantized = writer.memory.is_quantized(y)
    output = (writer.memory.buffer_address(y.buffer), 0) if quantized else writer.place(y)
    yield Op(
        rms_norm,
        rms_norm_arguments(
            x=writer.place(x),
            output=output,
            weight=writer.floats(operation, "weight"),
            columns=x.num_columns,
            eps=_number(operation.attributes["eps"]),
            residual=None if residual is None else writer.place(residual),
            total=None if total is None else writer.place(total),
            head_dim=None if head_dim is None else _integer(operation, "head_dim"),
            quantized=quantized,
        ),
    )


def _quantize(writer: OpWriter, operation: Operation, one: bool) -> Iterator[Op]:
    x, y = operation.inputs["x"], operation.outputs["y"]
    output = writer.memory.buffer_address(y.buffer)
    yield Op(quantize, quantize_arguments(a=writer.place(x), output=output, columns=x.num_columns))


def _map(function: str, first: str, second: str | None = None) -> Translation:
    def translate(writer: OpWriter, operation: Operation, one: bool) -> Iterator[Op]:
        a, y = operation.inputs[first], operation.outputs["y"]
        factor = operation.attributes.get("factor", operation.attributes.get("cap", 0.0))
        arguments = elementwise_arguments(
            function,
            a=writer.place(a),
            b=None if second is None else writer.place(operation.inputs[second]),
            output=writer.place(y),
            columns=y.num_columns,
            factor=_number(factor),
        )
        yield Op(elementwise, arguments)

    return translate


def _add_bias(writer: OpWriter, operation: Operation, one: bool) -> Iterator[Op]:
    x, y = operation.inputs["x"], operation.outputs["y"]
    bias = (writer.floats(operation, "bias"), 0)  # the same row for every token
    arguments = elementwise_arguments("add", a=writer.place(x), b=bias, output=writer.place(y), columns=y.num_columns)
    yield Op(elementwise, arguments)


def _select_rows(writer: OpWriter, operation: Operation, one: bool) -> Iterator[Op]:
    x, y = operation.inputs["x"], operation.outputs["y"]
    index = writer.memory.address(operation.inputs["row_index"])
    arguments = elementwise_arguments(
        "copy", a=writer.place(x), output=writer.place(y), columns=y.num_columns, row_index=index
    )
    yield Op(elementwise, arguments)


def _activation(writer: OpWriter, operation: Operation, one: bool) -> Iterator[Op]:
    y = operation.outputs["y"]
    quantized = writer.memory.is_quantized(y)
    x = operation.inputs["x" if operation.kind == "activation" else "gate"]
    kernel, arguments = activation_op(
        _text(operation.attributes["activation"]),
        x=writer.place(x),
        up=writer.place(operation.inputs["up"]) if "up" in operation.inputs else None,
        output=(writer.memory.buffer_address(y.buffer), 0) if quantized else writer.place(y),
        columns=y.num_columns,
        quantized=quantized,
    )
    yield Op(kernel, arguments)


# ---- products --------------------------------------------------------------------------------------------------------


def _linear(writer: OpWriter, operation: Operation, one: bool) -> Iterator[Op]:
    if writer.weights[operation.weights["weight"]].format in FORMATS:
        yield from _linear_int8(writer, operation, one)
    else:
        yield from _linear_float(writer, operation, one)


def linear_input(writer: OpWriter, operation: Operation) -> tuple[list[Op], Activations]:
    """The quantized columns that an integer product reads, and the ops that make them."""
    x = operation.inputs["x"]
    if writer.memory.is_quantized(x):
        groups = -(-writer.memory.buffers[x.buffer].columns // GROUP_SIZE)
        return [], Activations(writer.memory.buffer_address(x.buffer), groups, x.first_column // GROUP_SIZE)
    values = _quantized_copy(writer, x)  # a program without the pass that quantizes activations
    return [Op(quantize, quantize_arguments(a=writer.place(x), output=values.address, columns=x.num_columns))], values


def _linear_int8(writer: OpWriter, operation: Operation, one: bool) -> Iterator[Op]:
    y = operation.outputs["y"]
    before, values = linear_input(writer, operation)
    yield from before
    name = operation.attributes.get("activation")
    weight = writer.weights.linear(operation.weights["weight"], gated=name is not None)
    if writer.memory.is_quantized(y):
        output: Matrix | Activations = Activations(
            writer.memory.buffer_address(y.buffer), -(-y.num_columns // GROUP_SIZE)
        )
    else:
        output = Matrix(*writer.place(y))
    residual = operation.inputs.get("residual")
    arguments = linear_arguments(
        weight,
        values,
        output,
        writer.scratch("linear", max(SCRATCH_BYTES, FLOAT_SCRATCH_BYTES) * writer.places.num_threads),
        bias=writer.floats(operation, "bias"),
        residual=None if residual is None else Matrix(*writer.place(residual)),
        activation=None if name is None else _text(name),
    )
    variant = writer.choices.linear(weight, one_token=one)
    yield Op(linear_kernel(weight.format, one_token=one, variant=variant), arguments)


def _quantized_copy(writer: OpWriter, x: Operand) -> Activations:
    """Scratch memory for the quantized columns of x."""
    arrays = writer.places.arrays
    num_rows = max(arrays.max_num_tokens, arrays.max_num_rows)
    address = writer.scratch(f"quantized {x.num_columns}", int8_group32_bytes(num_rows, x.num_columns))
    return Activations(address, -(-x.num_columns // GROUP_SIZE))


def _linear_float(writer: OpWriter, operation: Operation, one: bool) -> Iterator[Op]:
    x, y = operation.inputs["x"], operation.outputs["y"]
    if writer.memory.is_quantized(x):
        raise _no_kernel(operation)
    name = operation.weights["weight"]
    weight = writer.weights[name]
    activation = operation.attributes.get("activation")
    residual = operation.inputs.get("residual")
    quantized = writer.memory.is_quantized(y)
    op = LinearFloatOp(
        x=writer.place(x),
        weight=writer.weights.float_linear(name, gated=activation is not None),
        is_bfloat16=weight.format == "bfloat16",
        num_rows=weight.shape[0],
        num_columns=weight.shape[1],
        output=(writer.memory.buffer_address(y.buffer), 0) if quantized else writer.place(y),
        scratch=writer.scratch("linear", max(SCRATCH_BYTES, FLOAT_SCRATCH_BYTES) * writer.places.num_threads),
        bias=writer.floats(operation, "bias"),
        residual=None if residual is None else writer.place(residual),
        activation=None if activation is None else _text(activation),
        quantized=quantized,
    )
    yield Op(linear_float, op.arguments())


def _experts(writer: OpWriter, operation: Operation, one: bool) -> Iterator[Op]:
    arrays = writer.places.arrays
    max_rows = max(arrays.max_num_tokens, arrays.max_num_rows)
    parts = (writer.memory, writer.weights, writer.choices, writer.scratch)
    resources = ExpertResources(*parts, max_rows, writer.places.num_threads)
    yield from (Op(kernel, arguments) for kernel, arguments in expert_ops(operation, resources))


# ---- positions, cache, attention -------------------------------------------------------------------------------------


def _rotation(writer: OpWriter, operation: Operation, one: bool) -> Iterator[Op]:
    y = operation.outputs["y"]
    arguments = rotation_arguments(
        positions=writer.memory.address(operation.inputs["positions"]),
        frequencies=writer.floats(operation, "frequencies"),
        output=writer.place(y),
        head_dim=y.num_columns,
        factor=_number(operation.attributes["factor"]),
    )
    yield Op(rotation, arguments)


def _rope(writer: OpWriter, operation: Operation, one: bool) -> Iterator[Op]:
    """`rope`, `write_cache` and `rope_write_cache`: one kernel does what there is of a query and of keys and values."""
    query = operation.inputs.get("query", operation.inputs.get("x"))
    key, value, turn = (operation.inputs.get(role) for role in ("key", "value", "rotation"))
    layer = operation.attributes.get("layer")
    if layer is None:
        head_dim = _integer(operation, "head_dim")
    else:
        head_dim = writer.places.shapes[_integer(operation, "layer")].head_dim
    op = RopeOp(
        head_dim=head_dim,
        num_heads=0 if query is None else query.num_columns // head_dim,
        num_kv_heads=0 if key is None else key.num_columns // head_dim,
        query=None if query is None else writer.place(query),
        output=None if query is None else writer.place(operation.outputs["y"]),
        key=None if key is None else writer.place(key),
        value=None if value is None else writer.place(value),
        rotation=None if turn is None else writer.place(turn),
        query_norm=writer.floats(operation, "query_norm"),
        key_norm=writer.floats(operation, "key_norm"),
        eps=_number(operation.attributes.get("eps") or 0.0),
        cache=None if layer is None else writer.places.cache(_integer(operation, "layer")),
    )
    yield Op(rope_write_cache, op.arguments())


def _attention(writer: OpWriter, operation: Operation, one: bool) -> Iterator[Op]:
    places, arrays = writer.places, writer.places.arrays
    num_heads, num_kv_heads, head_dim = (
        _integer(operation, name) for name in ("num_heads", "num_kv_heads", "head_dim")
    )
    window, soft_cap = operation.attributes.get("sliding_window"), operation.attributes.get("soft_cap")
    max_blocks = arrays.max_batch_size * arrays.block_tables.shape[1]
    partials = partial_bytes(num_heads, head_dim, arrays.tokens_per_block, max_blocks, arrays.max_batch_size)
    scratch = scratch_bytes(num_heads, num_kv_heads, head_dim) * places.num_threads
    op = AttentionOp(
        query=writer.place(operation.inputs["query"]),
        output=writer.place(operation.outputs["y"]),
        cache=places.cache(_integer(operation, "layer")),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=_number(operation.attributes["scale"]),
        scratch=writer.scratch("attention", scratch),
        partials=writer.scratch("attention partials", partials),
        sliding_window=None if window is None else _integer(operation, "sliding_window"),
        soft_cap=None if soft_cap is None else _number(soft_cap),
        deterministic=places.deterministic,
    )
    yield Op(attention, op.arguments())
    yield Op(attention_combine, op.arguments())


def _no_kernel(operation: Operation) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"The CPU has no kernel for the operation '{operation.name}' ({operation.kind}).",
        field="engine",
        remedy="Use backend='torch'.",
    )


_TRANSLATIONS: Final[Mapping[str, Translation]] = MappingProxyType({
    "embedding": _embedding,
    "rotation": _rotation,
    "rms_norm": _rms_norm,
    "add_rms_norm": _rms_norm,
    "quantize": _quantize,
    "linear": _linear,
    "add_bias": _add_bias,
    "rope": _rope,
    "write_cache": _rope,
    "rope_write_cache": _rope,
    "attention": _attention,
    "experts": _experts,
    "activation": _activation,
    "gated_activation": _activation,
    "add": _map("add", "a", "b"),
    "multiply": _map("multiply", "a", "b"),
    "scale": _map("scale", "x"),
    "copy": _map("copy", "x"),
    "select_rows": _select_rows,
    "soft_cap": _map("soft_cap", "x"),
})  # fmt: skip
"""By the operation's kind."""
