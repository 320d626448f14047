"""Where the lines of the picture run: each value has a lane from the node that computes it to the last that reads it.

The lanes are drawn beside the list of nodes as version control tools draw branches. A node without a line through it
that could be another node's is what makes a residual stream, or a rotation that all layers share, visible at a glance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from tokenmill.builder.graph import Graph, Node

LANE_WIDTH: Final = 13
ROW_HEIGHT: Final = 30
_FIRST_ROLES: Final = ("residual", "a", "x", "query", "gate")
"""Inputs whose lane the output takes over first: the stream stays a straight line."""


@dataclass(frozen=True, slots=True)
class RowLanes:
    """The lines of one row.

    Args:
        node: lane of the node's dot.
        passing: lanes that go through.
        incoming: lanes that reach the node from above.
        outgoing: lanes that leave it downwards.
        before: lanes alive above the row.
        after: lanes alive below it.
    """

    node: int
    passing: tuple[int, ...]
    incoming: tuple[int, ...]
    outgoing: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lanes:
    """The lines of a graph.

    Args:
        rows: for each node.
        num_lanes: side by side, at most.
    """

    rows: tuple[RowLanes, ...]
    num_lanes: int


def lay_out(graph: Graph) -> Lanes:
    """Lanes for the values of a graph; those of its inputs begin above the first row."""
    last_use = {graph.output: len(graph.nodes)}
    for position, node in enumerate(graph.nodes):
        for name in _read(node):
            last_use[name] = max(position, last_use.get(name, position))
    lanes = {value.name: lane for lane, value in enumerate(graph.inputs)}
    rows, num_lanes = [], len(lanes)
    for position, node in enumerate(graph.nodes):
        before = tuple(sorted(lanes.values()))
        read = [name for name in _by_preference(node) if name in lanes]
        dying = [name for name in read if last_use[name] == position]
        incoming = [lanes[name] for name in read]
        free_first = [lanes.pop(name) for name in dying]
        outgoing = []
        for value in sorted(node.outputs.values(), key=lambda one: one is not node.outputs.get("sum")):
            lane = free_first.pop(0) if free_first else _lowest_free(lanes.values())
            if last_use.get(value.name, -1) > position:
                lanes[value.name] = lane
            outgoing.append(lane)
        after = tuple(sorted(lanes.values()))
        place = outgoing[0] if outgoing else min(incoming, default=0)
        passing = tuple(lane for lane in before if lane in after and lane not in outgoing)
        rows.append(RowLanes(place, passing, tuple(dict.fromkeys(incoming)), tuple(outgoing), before, after))
        num_lanes = max(num_lanes, 1 + max((*before, *after, place)))
    return Lanes(tuple(rows), num_lanes)


def row_svg(row: RowLanes, num_lanes: int) -> str:
    """The lines and the dot of a row."""
    middle, x = ROW_HEIGHT / 2, _x(row.node)
    paths = [_path(lane, f"M{_x(lane)} 0V{ROW_HEIGHT}") for lane in row.passing]
    for lane in row.incoming:
        curve = f"M{_x(lane)} 0" + (f"V{middle}" if lane == row.node else f"C{_x(lane)} {middle} {x} 2 {x} {middle}")
        paths.append(_path(lane, curve))
    for lane in row.outgoing:
        if lane in row.after:
            end = f"{_x(lane)} {ROW_HEIGHT}"
            curve = f"M{x} {middle}" + (
                f"L{end}" if lane == row.node else f"C{x} {ROW_HEIGHT - 2} {_x(lane)} {middle} {end}"
            )
            paths.append(_path(lane, curve))
    return _svg(num_lanes, "".join(paths) + f'<circle cx="{x}" cy="{middle}" r="4"/>')


def input_svg(lane: int, num_lanes: int) -> str:
    """The beginning of an input's line, beside those of the inputs before it."""
    inputs = tuple(range(lane))
    return row_svg(RowLanes(lane, inputs, (), (lane,), inputs, (*inputs, lane)), num_lanes)


def passing_svg(lanes: Sequence[int], num_lanes: int) -> str:
    """Lines that only go through, stretched to any height."""
    paths = "".join(_path(lane, f"M{_x(lane)} 0V{ROW_HEIGHT}") for lane in lanes)
    return _svg(num_lanes, paths, ' preserveAspectRatio="none"')


def _svg(num_lanes: int, content: str, more: str = "") -> str:
    width = num_lanes * LANE_WIDTH + 4
    return (
        f'<svg class="rail" aria-hidden="true" width="{width}" height="{ROW_HEIGHT}" '
        f'viewBox="0 0 {width} {ROW_HEIGHT}"{more}>{content}</svg>'
    )


def _path(lane: int, curve: str) -> str:
    color = lane and 1 + (lane - 1) % 5  # the first lane, the residual stream's, has one of its own
    return f'<path class="l{color}" d="{curve}"/>'


def _x(lane: int) -> int:
    return lane * LANE_WIDTH + 8


def _read(node: Node) -> Iterable[str]:
    return (*node.inputs.values(), *node.weights.values())


def _by_preference(node: Node) -> list[str]:
    """Names of what a node reads, those first whose lane the output should take."""
    order = {role: place for place, role in enumerate(_FIRST_ROLES)}
    roles = sorted(node.inputs, key=lambda role: order.get(role, len(order)))
    return list(dict.fromkeys((*(node.inputs[role] for role in roles), *node.weights.values())))


def _lowest_free(taken: Iterable[int]) -> int:
    used, lane = set(taken), 0
    while lane in used:
        lane += 1
    return lane
