"""The ops of the operation `experts`: routing, lists, inputs, two products, the sum. Called by `cpu_operations.py`.

Memory for the rows of the largest step is taken once and shared by all layers: tokens * top_k rows, and what fills up
panels of quantized rows, however the step's tokens are spread over the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np

from tokenmill.ops.cpu import linear_float as float_kernel
from tokenmill.ops.cpu import linear_int8 as int8_kernel
from tokenmill.ops.cpu.expert_lists import ExpertLists, choose_experts, list_experts, padded_pairs
from tokenmill.ops.cpu.experts import (
    ROW_BYTES,
    ExpertProducts,
    combine_arguments,
    combine_experts,
    expert_products,
    gather_arguments,
    gather_rows,
    op_row,
)
from tokenmill.ops.cpu.jit import NativeFunction
from tokenmill.ops.cpu.layout import GROUP_BYTES
from tokenmill.ops.cpu.linear_float import LinearFloatOp, linear_float
from tokenmill.ops.cpu.linear_int8 import Activations, LinearWeight, Matrix, linear_arguments, linear_kernel
from tokenmill.ops.cpu.packing import FORMATS, ROW_BLOCK, encoding_of, num_groups, padded_rows
from tokenmill.program.program import Operand, Operation
from tokenmill.runtime.cpu_memory import FLOAT_BYTES, ProgramMemory
from tokenmill.runtime.cpu_weights import CpuWeights, ExpertStack
from tokenmill.runtime.kernel_choices import KernelChoices

ExpertOp: TypeAlias = tuple[NativeFunction, tuple[int | NativeFunction, ...]]
"""A kernel and the arguments of its op row, in which functions stand for their addresses."""

_INT8_COLUMNS: Final = (int8_kernel.VALUES, int8_kernel.WEIGHT, int8_kernel.NUM_BLOCKS, int8_kernel.SCRATCH)
_FLOAT_COLUMNS: Final = (float_kernel.X, float_kernel.WEIGHT, float_kernel.NUM_BLOCKS, float_kernel.SCRATCH)
_SCRATCH_BYTES: Final = max(int8_kernel.SCRATCH_BYTES, float_kernel.SCRATCH_BYTES)


@dataclass(frozen=True, slots=True)
class ExpertResources:
    """What the ops are made of.

    Args:
        memory, weights, choices: of the program's executor.
        scratch: `scratch(use, num_bytes)` gives the address of memory that all ops of a use share.
        max_rows: tokens (or rows) of the largest step.
        num_threads: that need scratch memory.
    """

    memory: ProgramMemory
    weights: CpuWeights
    choices: KernelChoices
    scratch: Callable[[str, int], int]
    max_rows: int
    num_threads: int


@dataclass(frozen=True, slots=True)
class _Rows:
    """A buffer with a row for each pair.

    Args:
        address: of it.
        columns: of a row.
        quantized: `int8_group32` panels, else float32.
    """

    address: int
    columns: int
    quantized: bool = False

    @property
    def num_groups(self) -> int:
        """Groups of a quantized row."""
        return num_groups(self.columns)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.num_groups * GROUP_BYTES if self.quantized else self.columns * FLOAT_BYTES


def expert_ops(operation: Operation, resources: ExpertResources) -> Iterator[ExpertOp]:
    """The ops of an operation `experts`, for any number of tokens."""
    memory, weights, max_rows = resources.memory, resources.weights, resources.max_rows
    num_experts, top_k = (_integer(operation, name) for name in ("num_experts", "top_k"))
    x, y, logits = operation.inputs["x"], operation.outputs["y"], operation.inputs["router_logits"]
    gate_up = weights.experts(operation.weights["gate_up"], num_experts, gated=True)
    down = weights.experts(operation.weights["down"], num_experts, gated=False)
    size = ExpertLists.num_bytes(num_experts, top_k, max_rows)
    lists = ExpertLists(resources.scratch("expert lists", size), num_experts, top_k, max_rows)
    routing = lists.arguments(_place(memory, logits), normalize=bool(operation.attributes["normalize"]))
    num_rows = padded_pairs(max_rows * top_k, num_experts)
    inputs = _input_rows("expert inputs", num_rows, gate_up, resources)
    inner = _input_rows("expert inner values", num_rows, down, resources)
    columns = down.first.num_rows
    outputs = _Rows(resources.scratch("expert outputs", max_rows * top_k * columns * FLOAT_BYTES), columns)
    yield choose_experts, routing
    yield list_experts, routing
    yield (
        gather_rows,
        gather_arguments(
            lists, x=_place(memory, x), columns=x.num_columns, output=inputs.address, quantized=inputs.quantized
        ),
    )
    yield _products(lists, gate_up, inputs, inner, str(operation.attributes["activation"]), resources)
    yield _products(lists, down, inner, outputs, None, resources)
    place = outputs.address, outputs.row_bytes
    yield combine_experts, combine_arguments(lists, x=place, output=_place(memory, y), columns=columns)


def _input_rows(use: str, num_rows: int, weight: ExpertStack, resources: ExpertResources) -> _Rows:
    """Memory for what a product reads, in the type that its kernel wants."""
    rows = _Rows(0, weight.first.num_columns, weight.first.format in FORMATS)
    return replace(rows, address=resources.scratch(use, num_rows * rows.row_bytes))


def _products(
    lists: ExpertLists,
    weight: ExpertStack,
    inputs: _Rows,
    outputs: _Rows,
    activation: str | None,
    resources: ExpertResources,
) -> ExpertOp:
    """One product of all experts: with an activation from x to inner values, without from these to outputs."""
    first, choices = weight.first, resources.choices
    scratch = resources.scratch("linear", _SCRATCH_BYTES * resources.num_threads)
    num_blocks = padded_rows(first.num_rows, gated=first.gated) // ROW_BLOCK
    if inputs.quantized:
        arguments = _int8_arguments(first, inputs, outputs, activation, scratch)
        one_row, several_rows = (
            linear_kernel(first.format, one_token=one, variant=choices.linear(first, one_token=one))
            for one in (True, False)
        )
        kernels = one_row, several_rows
        block_bytes = inputs.num_groups * encoding_of(first.format).group_bytes
    else:
        arguments = _float_arguments(first, inputs, outputs, activation, scratch)
        kernels = (linear_float, linear_float)
        block_bytes = weight.num_bytes // num_blocks
    products = ExpertProducts(
        lists=lists,
        template=resources.memory.put(np.array(op_row(arguments), np.int64).view(np.uint8)),
        kernels=kernels,
        parts=resources.scratch("expert parts", ROW_BYTES * resources.num_threads),
        expert_bytes=weight.num_bytes,
        num_blocks=num_blocks,
        block_bytes=block_bytes,
        gated=first.gated,
        reads_inner=activation is None,
        input_bytes=inputs.row_bytes,
        output_bytes=outputs.row_bytes,
        output_quantized=outputs.quantized,
        columns=_INT8_COLUMNS if inputs.quantized else _FLOAT_COLUMNS,
        scratch_bytes=_SCRATCH_BYTES,
    )
    return expert_products, products.arguments()


def _int8_arguments(
    weight: LinearWeight, inputs: _Rows, outputs: _Rows, activation: str | None, scratch: int
) -> tuple[int, ...]:
    output: Matrix | Activations = Matrix(outputs.address, outputs.row_bytes)
    if outputs.quantized:
        output = Activations(outputs.address, outputs.num_groups)
    values = Activations(inputs.address, inputs.num_groups)
    return linear_arguments(weight, values, output, scratch, activation=activation)


def _float_arguments(
    weight: LinearWeight, inputs: _Rows, outputs: _Rows, activation: str | None, scratch: int
) -> tuple[int, ...]:
    return LinearFloatOp(
        x=(inputs.address, inputs.row_bytes),
        weight=weight.address,
        is_bfloat16=weight.format == "bfloat16",
        num_rows=weight.num_rows,
        num_columns=weight.num_columns,
        output=(outputs.address, outputs.row_bytes),
        scratch=scratch,
        activation=activation,
        quantized=outputs.quantized,
    ).arguments()


def _place(memory: ProgramMemory, operand: Operand) -> tuple[int, int]:
    return memory.address(operand), memory.stride(operand)


def _integer(operation: Operation, name: str) -> int:
    value = operation.attributes[name]
    assert isinstance(value, int), value
    return value
