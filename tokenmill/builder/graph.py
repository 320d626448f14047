"""`Graph`: a model between capture and program. Nodes compute values; every value is written once.

A value is [rows, columns]: heads lie side by side in the columns. Kinds of nodes are those of `program.OPERATIONS` and
three that only a graph has: `slice` and `concat` of columns, and `offset_weight`, arithmetic on a weight alone.
`capture.py` makes a graph, `passes/` rewrite it, `lowering.py` turns it into a `Program`.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from tokenmill.program.program import OPERATIONS, AttributeValue, BufferDtype, Dim, OperationKind, Weight

GRAPH_KINDS: Final[Mapping[str, OperationKind]] = {
    "slice": OperationKind(("x",), ("y",), (), ("first_column", "num_columns"), "some columns of x"),
    "concat": OperationKind(("x0", "x1?"), ("y",), (), (), "x0, x1, ... side by side"),
    "offset_weight": OperationKind(
        (), ("y",), ("weight",), ("offset",), "weight + offset; other nodes use y as a weight"
    ),
}
"""Kinds of nodes that no program holds: lowering turns them into views, copies and weights."""


@dataclass(frozen=True, slots=True)
class Value:
    """What a node computes.

    Args:
        name: unique in the graph.
        rows: tokens of the step, rows whose logits are wanted, or a number (1 for `offset_weight`).
        columns: numbers in a row.
        dtype: of the numbers.
    """

    name: str
    rows: Dim
    columns: int
    dtype: BufferDtype = "float32"

    def __str__(self) -> str:
        return f"[{self.rows}, {self.columns}] {self.dtype}"


@dataclass(frozen=True, slots=True)
class Node:
    """One operation on values.

    Args:
        kind: a key of `OPERATIONS` or `GRAPH_KINDS`.
        name: where it comes from; unique in the graph.
        inputs: names of values, by role.
        outputs: values, by role.
        weights: names of weights, or of values of `offset_weight`, by role.
        attributes: numbers and names.
    """

    kind: str
    name: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, Value] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)

    @property
    def y(self) -> Value:
        """The output of the role `y`."""
        return self.outputs["y"]


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in an order in which they can be executed.

    Args:
        inputs: values from outside: `token_ids`, `positions`, `row_index`.
        output: name of the logits.
        nodes: see above. `write_cache` and `attention` of a layer keep their order.
        weights: every constant, by name.
        constants: numbers of the weights that no checkpoint holds.
    """

    inputs: tuple[Value, ...]
    output: str
    nodes: tuple[Node, ...]
    weights: Mapping[str, Weight]
    constants: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def values(self) -> dict[str, Value]:
        """All values by name."""
        found = {value.name: value for value in self.inputs}
        for node in self.nodes:
            found.update((value.name, value) for value in node.outputs.values())
        return found

    def producers(self) -> dict[str, Node]:
        """The node that computes each value, by the value's name; inputs have none."""
        return {value.name: node for node in self.nodes for value in node.outputs.values()}

    def users(self) -> dict[str, list[Node]]:
        """The nodes that read each value, in order; a node that reads it twice is listed twice."""
        found: dict[str, list[Node]] = {name: [] for name in self.values()}
        for node in self.nodes:
            for name in (*node.inputs.values(), *node.weights.values()):
                if name in found:
                    found[name].append(node)
        return found

    def nodes_of_kind(self, kind: str) -> Iterator[Node]:
        """In order."""
        return (node for node in self.nodes if node.kind == kind)

    def check(self) -> None:
        """Assert that every name is defined once, before it is read, and that roles are those of the node's kind."""
        defined = {value.name for value in self.inputs}
        names: set[str] = set()
        for node in self.nodes:
            kind = OPERATIONS.get(node.kind) or GRAPH_KINDS[node.kind]
            assert node.name not in names, f"two nodes are called {node.name}"
            names.add(node.name)
            if node.kind != "concat":
                _check_roles(node, "inputs", kind.inputs, node.inputs)
            _check_roles(node, "outputs", kind.outputs, node.outputs)
            _check_roles(node, "weights", kind.weights, node.weights)
            _check_roles(node, "attributes", kind.attributes, node.attributes)
            for name in node.inputs.values():
                assert name in defined, f"{node.name} reads {name}, which is not computed before it"
            for name in node.weights.values():
                assert name in self.weights or name in defined, f"{node.name} reads the unknown weight {name}"
            for value in node.outputs.values():
                assert value.name not in defined, f"{value.name} is computed twice"
                defined.add(value.name)
        assert self.output in defined, f"the output {self.output} is not computed"

    def text(self) -> str:
        """One line for each node: `value = kind(role=value, ...) -> [rows, columns] dtype`."""
        lines = [f"input {value.name} {value}" for value in self.inputs]
        lines.extend(self._line(node) for node in self.nodes)
        return "\n".join([*lines, f"output {self.output}"])

    def _line(self, node: Node) -> str:
        arguments = [f"{role}=%{name}" for role, name in node.inputs.items()]
        for role, name in node.weights.items():
            weight = self.weights.get(name)
            text = f"%{name}" if weight is None else f"@{name} {list(weight.shape)} {weight.format}"
            arguments.append(f"{role}={text}")
        arguments.extend(f"{name}={value!r}" for name, value in node.attributes.items())
        outputs = ", ".join(f"%{value.name}" for value in node.outputs.values())
        types = ", ".join(str(value) for value in node.outputs.values())
        call = f"{node.kind}({', '.join(arguments)})"
        return f"{outputs} = {call} -> {types}" if outputs else f"{node.name}: {call}"


def assign_formats(graph: Graph, formats: Mapping[str, str]) -> Graph:
    """The graph with the formats of checkpoint tensors, by their names; what is not named stays as it is."""
    weights = {
        name: replace(weight, format=formats[weight.parts[0].name])
        if weight.parts and weight.parts[0].name in formats
        else weight
        for name, weight in graph.weights.items()
    }
    return replace(graph, weights=weights)


def free_name(wanted: str, taken: Container[str]) -> str:
    """`wanted`, or with the first number that makes it another name than those that are taken."""
    name, number = wanted, 0
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name


def diff(before: Graph, after: Graph, *, context: int = 1) -> str:
    """What changed between two graphs, as a unified diff of their texts; empty if nothing did."""
    lines = difflib.unified_diff(
        before.text().splitlines(), after.text().splitlines(), "before", "after", n=context, lineterm=""
    )
    return "\n".join(lines)


def _check_roles(node: Node, what: str, known: Sequence[str], given: Mapping[str, object]) -> None:
    required = {role for role in known if not role.endswith("?")}
    allowed = {role.removesuffix("?") for role in known}
    assert required <= given.keys() <= allowed, f"{what} of {node.kind} {node.name} are {list(given)}, not {known}"
