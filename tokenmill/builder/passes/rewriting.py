"""What passes are made of: `Rewriter` collects changes of a graph and applies them at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tokenmill.builder.graph import Graph, Node, free_name
from tokenmill.program.program import Weight


@dataclass(frozen=True, slots=True)
class Target:
    """What the passes may assume of the executor.

    Args:
        int8_activation_formats: formats of weights whose products take activations as `int8_group32`.
    """

    int8_activation_formats: frozenset[str] = frozenset()


class Rewriter:
    """Changes to one graph. The graph that is asked stays the one of the beginning; `result` has all changes.

    Args:
        graph: what is rewritten.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.values = graph.values()
        self.producers = graph.producers()
        self.users = graph.users()
        self.positions = {node.name: position for position, node in enumerate(graph.nodes)}
        self.changes: list[str] = []
        self._new_nodes: dict[str, tuple[Node, ...]] = {}
        self._renamed: dict[str, str] = {}
        self._weights: dict[str, Weight] = {}
        self._names = {node.name for node in graph.nodes} | self.values.keys() | graph.weights.keys()

    def producer(self, value: str, kind: str) -> Node | None:
        """The node that computes `value`, if it is of this kind and no change took it yet."""
        node = self.producers.get(value)
        return node if node is not None and node.kind == kind and not self.is_taken(node) else None

    def only_user(self, value: str) -> Node | None:
        """The one node that reads `value`, once; None if there are others, or `value` is the graph's output."""
        users = self.users[value]
        return users[0] if len(users) == 1 and value != self.graph.output else None

    def is_taken(self, node: Node) -> bool:
        """Whether a change replaces `node` already."""
        return node.name in self._new_nodes

    def replace(self, node: Node, *new_nodes: Node) -> None:
        """Put `new_nodes` where `node` is."""
        assert not self.is_taken(node), f"{node.name} is replaced twice"
        self._new_nodes[node.name] = new_nodes

    def remove(self, *nodes: Node) -> None:
        """Drop nodes whose values nobody needs after the other changes."""
        for node in nodes:
            self.replace(node)

    def rename(self, old: str, new: str) -> None:
        """Whoever reads the value `old` reads `new`."""
        self._renamed[old] = new

    def new_name(self, wanted: str) -> str:
        """`wanted` for a node and its value, with a number if something is called so already."""
        name = free_name(wanted, self._names)
        self._names.add(name)
        return name

    def add_weight(self, weight: Weight) -> str:
        """A new weight; returns its name."""
        self._weights[weight.name] = weight
        return weight.name

    def report(self, text: str) -> None:
        """A line for the pass's report."""
        self.changes.append(text)

    def result(self) -> Graph:
        """The graph with all changes."""
        if not self._new_nodes and not self._renamed and not self._weights:
            return self.graph
        nodes: list[Node] = []
        for node in self.graph.nodes:
            nodes.extend(self._renamed_node(one) for one in self._new_nodes.get(node.name, (node,)))
        weights = {**self.graph.weights, **self._weights}
        return replace(self.graph, output=self._final(self.graph.output), nodes=tuple(nodes), weights=weights)

    def _renamed_node(self, node: Node) -> Node:
        names = (*node.inputs.values(), *node.weights.values())
        if self._renamed.keys().isdisjoint(names):
            return node
        return replace(node, inputs=self._final_names(node.inputs), weights=self._final_names(node.weights))

    def _final_names(self, names: Mapping[str, str]) -> dict[str, str]:
        return {role: self._final(name) for role, name in names.items()}

    def _final(self, name: str) -> str:
        while name in self._renamed:
            name = self._renamed[name]
        return name
