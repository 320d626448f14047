"""From a graph to a `Program`: values become columns of buffers, views disappear, what is left is a list of operations.

A slice is an operand with a first column. The parts of a concatenation are written where they belong by whoever
computes them; only a part that lives elsewhere already is copied.
"""

from __future__ import annotations

from typing import Final

from tokenmill.builder.graph import Graph, Node, Value
from tokenmill.builder.passes.fold_constants import fold_weights
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.program.program import Buffer, Operand, Operation, Program

OUTPUT: Final = "logits"
"""Name of the program's output buffer."""


def lower(graph: Graph) -> Program:
    """The program of a graph, with or without passes; memory is not planned yet.

    Raises:
        UnsupportedFeatureError: the graph computes with weights what no program can store.
    """
    graph, _ = fold_weights(graph)
    for node in graph.nodes_of_kind("offset_weight"):
        raise UnsupportedFeatureError(
            f"{node.name} adds {node.attributes['offset']} to a weight; programs know 1 only.", field="model"
        )
    lowering = _Lowering(graph)
    for node in graph.nodes:
        lowering.add(node)
    return lowering.program()


class _Lowering:
    """Places values and collects operations."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._values = graph.values()
        self._producers = graph.producers()
        self._buffers: dict[str, Buffer] = {}
        self._operands: dict[str, Operand] = {}
        self._operations: list[Operation] = []
        for value in graph.inputs:
            self._operands[value.name] = Operand(value.name, 0, value.columns)
        self._place_output()
        # The last concatenation first: a part of it may be a concatenation itself.
        for node in reversed(graph.nodes):
            if node.kind == "concat":
                self._place_concat(node)

    def _place_output(self) -> None:
        value = self._values[self._graph.output]
        producer = self._producers.get(value.name)
        if producer is not None and producer.kind != "slice":
            self._operands[value.name] = Operand(OUTPUT, 0, value.columns)

    def _place_concat(self, node: Node) -> None:
        """Let the parts be computed in place."""
        whole = self._operand_of(node.y)
        first = whole.first_column
        for name in node.inputs.values():
            value, producer = self._values[name], self._producers.get(name)
            if name not in self._operands and producer is not None and producer.kind != "slice":
                self._operands[name] = Operand(whole.buffer, first, value.columns)
            first += value.columns

    def _operand_of(self, value: Value) -> Operand:
        """Where a value lies; a buffer of its own if nothing else was decided."""
        if value.name not in self._operands:
            self._buffers[value.name] = Buffer(value.name, value.rows, value.columns, value.dtype)
            self._operands[value.name] = Operand(value.name, 0, value.columns)
        return self._operands[value.name]

    def add(self, node: Node) -> None:
        """The operations of a node: one, or copies, or none."""
        if node.kind == "slice":
            source, first = self._operands[node.inputs["x"]], node.attributes["first_column"]
            assert isinstance(first, int)
            self._operands[node.y.name] = Operand(source.buffer, source.first_column + first, node.y.columns)
            return
        outputs = {role: self._operand_of(value) for role, value in node.outputs.items()}
        if node.kind == "concat":
            self._copy_parts(node, outputs["y"])
            return
        inputs = {role: self._operands[name] for role, name in node.inputs.items()}
        self._operations.append(Operation(node.kind, node.name, inputs, outputs, node.weights, node.attributes))

    def _copy_parts(self, node: Node, whole: Operand) -> None:
        first = whole.first_column
        for role, name in node.inputs.items():
            part = self._operands[name]
            place = Operand(whole.buffer, first, part.num_columns)
            if part != place:
                self._operations.append(Operation("copy", f"{node.name}.{role}", {"x": part}, {"y": place}))
            first += part.num_columns

    def program(self) -> Program:
        """What has been collected."""
        value = self._values[self._graph.output]
        place = self._operands[value.name]
        output = Buffer(OUTPUT, value.rows, value.columns)
        if place.buffer != OUTPUT:
            whole = Operand(OUTPUT, 0, value.columns)
            self._operations.append(Operation("copy", OUTPUT, {"x": place}, {"y": whole}))
        used = {name for operation in self._operations for name in operation.weights.values()}
        return Program(
            inputs=tuple(Buffer(one.name, one.rows, one.columns, one.dtype) for one in self._graph.inputs),
            output=output,
            buffers=tuple(self._buffers.values()),
            weights=tuple(weight for name, weight in self._graph.weights.items() if name in used),
            operations=tuple(self._operations),
        )


def program_text(program: Program) -> str:
    """One line for each operation: `outputs = kind(inputs, weights, attributes)`, with buffers and their columns."""
    return "\n".join(_operation_line(operation) for operation in program.operations)


def _operation_line(operation: Operation) -> str:
    arguments = [f"{role}={_operand_text(one)}" for role, one in operation.inputs.items()]
    arguments += [f"{role}=@{name}" for role, name in operation.weights.items()]
    arguments += [f"{name}={value!r}" for name, value in operation.attributes.items()]
    outputs = ", ".join(_operand_text(one) for one in operation.outputs.values())
    call = f"{operation.kind}({', '.join(arguments)})"
    return f"{outputs} = {call}" if outputs else call


def _operand_text(operand: Operand) -> str:
    last = operand.first_column + operand.num_columns
    return f"%{operand.buffer}[{operand.first_column}:{last}]"
