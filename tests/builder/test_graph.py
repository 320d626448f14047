"""The graph: what `check` finds, text, differences, formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tokenmill.builder.graph import Graph, Node, Value, assign_formats, diff
from tokenmill.program.program import Weight, WeightPart

X = Value("x", "tokens", 4)


def node(name: str, x: str = "x", columns: int = 4, **changes: object) -> Node:
    return replace(Node("scale", name, {"x": x}, {"y": Value(name, "tokens", columns)}, {}, {"factor": 2.0}), **changes)


def graph() -> Graph:
    weights = {"w": Weight("w", (3, 4), parts=(WeightPart("w.weight", 3),))}
    linear = Node("linear", "c", {"x": "b"}, {"y": Value("c", "tokens", 3)}, {"weight": "w"})
    return Graph((X,), "c", (node("a"), node("b", "a"), linear), weights)


def test_a_sound_graph_passes() -> None:
    graph().check()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda g: replace(g, nodes=g.nodes[::-1]), "not computed before it"),
        (lambda g: replace(g, nodes=(*g.nodes, node("a"))), "two nodes are called a"),
        (lambda g: replace(g, nodes=(*g.nodes, replace(node("d"), outputs={"y": X}))), "x is computed twice"),
        (lambda g: replace(g, output="d"), "the output d"),
        (lambda g: replace(g, weights={}), "unknown weight w"),
        (lambda g: replace(g, nodes=(*g.nodes, node("d", attributes={}))), "attributes of scale d"),
        (lambda g: replace(g, nodes=(*g.nodes, node("d", inputs={"x": "x", "z": "x"}))), "inputs of scale d"),
    ],
)
def test_an_unsound_graph_is_found(spoil: Callable[[Graph], Graph], complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        spoil(graph()).check()


def test_text() -> None:
    assert graph().text().splitlines() == [
        "input x [tokens, 4] float32",
        "%a = scale(x=%x, factor=2.0) -> [tokens, 4] float32",
        "%b = scale(x=%a, factor=2.0) -> [tokens, 4] float32",
        "%c = linear(x=%b, weight=@w [3, 4] float32) -> [tokens, 3] float32",
        "output c",
    ]


def test_diff_shows_what_changed() -> None:
    before = graph()
    after = replace(before, nodes=(node("a", attributes={"factor": 3.0}), *before.nodes[1:]))
    lines = diff(before, after).splitlines()
    assert "-%a = scale(x=%x, factor=2.0) -> [tokens, 4] float32" in lines
    assert "+%a = scale(x=%x, factor=3.0) -> [tokens, 4] float32" in lines
    assert sum(line[0] in "+-" for line in lines) == 4  # with the two lines of the header
    assert diff(before, before) == ""


def test_users_and_producers() -> None:
    twice = node("d", "b", kind="add", inputs={"a": "b", "b": "b"}, attributes={})
    whole = replace(graph(), nodes=(*graph().nodes, twice))
    assert [user.name for user in whole.users()["b"]] == ["c", "d", "d"]
    assert whole.producers()["b"].name == "b"
    assert "x" not in whole.producers()


def test_formats_go_by_the_names_of_checkpoint_tensors() -> None:
    assert assign_formats(graph(), {"w.weight": "q4_1", "w": "q8_0", "other": "q8_0"}).weights["w"].format == "q4_1"
