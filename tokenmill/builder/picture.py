"""`graph_html`: a model before and after the passes as one self-contained page, for any browser, without a network.

Beside every node run the lines of the values that it reads and writes; layers fold; shapes, bytes, operations and, once
measured, times stand in columns. What each pass changed is listed with its difference. Works without JavaScript, which
only adds switches and a search.
"""

from __future__ import annotations

import html
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tokenmill.builder.graph import GRAPH_KINDS, Graph, Node
from tokenmill.builder.passes import PASSES, PassReport
from tokenmill.builder.picture_lanes import LANE_WIDTH, Lanes, input_svg, lay_out, passing_svg, row_svg
from tokenmill.builder.picture_style import CSS, JAVASCRIPT
from tokenmill.program.costs import Block, Cost, StepSize, operation_cost
from tokenmill.program.program import Weight

MAX_DIFF_LINES: Final = 60
"""Lines of a pass's difference that the page shows."""

MAX_CHANGES: Final = 12
"""Changes of a pass that the page lists."""

DEFAULT_STEPS: Final[Mapping[str, StepSize]] = {
    "1 token, 512 cached": StepSize(num_tokens=1, num_rows=1, context_len=512),
    "16 sequences, 512 cached": StepSize(num_tokens=16, num_rows=16, num_sequences=16, context_len=512),
    "prompt of 512 tokens": StepSize(num_tokens=512, num_rows=1, context_len=512),
}

_CLASSES: Final[Mapping[str, str]] = {
    "linear": "matmul",
    "attention": "attention",
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "quantize": "norm",
    "write_cache": "cache",
    "rope_write_cache": "cache",
    "rope": "cache",
    "slice": "view",
    "concat": "view",
    "offset_weight": "view",
}
_LEGEND: Final = {
    "matmul": "product",
    "attention": "attention",
    "norm": "norm, quantize",
    "cache": "rotation, cache",
    "view": "view",
    "other": "other",
}


@dataclass(frozen=True, slots=True)
class _Panel:
    """One of the two networks.

    Args:
        key: `before` or `after`.
        graph: what is drawn.
        lanes: its lines.
        costs: of each node, for each step.
        times: microseconds by the node's name; empty if nothing was measured.
    """

    key: str
    graph: Graph
    lanes: Lanes
    costs: tuple[tuple[Cost, ...], ...]
    times: Mapping[str, float]

    @property
    def rail_width(self) -> int:
        return self.lanes.num_lanes * LANE_WIDTH + 4


def graph_html(
    title: str,
    before: Graph,
    after: Graph,
    reports: Sequence[PassReport],
    *,
    facts: Mapping[str, str] | None = None,
    steps: Mapping[str, StepSize] = DEFAULT_STEPS,
    times: Mapping[str, float] | None = None,
) -> str:
    """The page.

    Args:
        title: the model's name.
        before, after: the network as captured and as lowered.
        reports: of the passes between them.
        facts: lines for the table on top, such as the memory plan's size.
        steps: sizes that bytes and operations are shown for, by label; the first is shown at first.
        times: microseconds of each operation by its name, if it was profiled.
    """
    panels = [_panel("before", before, steps, {}), _panel("after", after, steps, times or {})]
    heading = html.escape(title)
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{heading}: network</title>\n<style>{CSS}{_step_rules(len(steps))}</style>\n</head>",
            '<body data-view="after" data-step="0">',
            f"<header><h1>{heading}</h1>",
            f"<p>{len(before.nodes)} nodes as captured, {len(after.nodes)} after the passes. Lines are values: each "
            "runs from the node that computes it to the last one that reads it.</p></header>",
            '<section aria-label="Overview" class="tables">',
            _facts(facts or {}, panels, list(steps)),
            _kinds(before, after),
            "</section>",
            _passes(reports),
            "<h2>Network</h2>",
            _controls(list(steps)),
            '<main class="panels">',
            *(_panel_html(panel) for panel in panels),
            f"</main>\n<script>{JAVASCRIPT}</script>\n</body>\n</html>",
        )
    )


def _panel(key: str, graph: Graph, steps: Mapping[str, StepSize], times: Mapping[str, float]) -> _Panel:
    blocks = {name: Block(one.rows, one.columns, one.dtype) for name, one in graph.values().items()}
    offset = {one.y.name: graph.weights[one.weights["weight"]] for one in graph.nodes_of_kind("offset_weight")}
    weights = {**graph.weights, **offset}
    costs = tuple(tuple(_cost(node, blocks, weights, step) for step in steps.values()) for node in graph.nodes)
    return _Panel(key, graph, lay_out(graph), costs, times)


def _cost(node: Node, blocks: Mapping[str, Block], weights: Mapping[str, Weight], step: StepSize) -> Cost:
    """What a node moves and computes; views, which become operands, nothing."""
    if node.kind in GRAPH_KINDS:
        return Cost()
    inputs = {role: blocks[name] for role, name in node.inputs.items()}
    outputs = {role: blocks[value.name] for role, value in node.outputs.items()}
    used = {role: weights[name] for role, name in node.weights.items()}
    return operation_cost(node.kind, inputs, outputs, used, node.attributes, step)


def _step_rules(num_steps: int) -> str:
    return "".join(f"body:not([data-step='{index}']) .s{index} {{ display: none; }}\n" for index in range(num_steps))


# ---- overview --------------------------------------------------------------------------------------------------


def _facts(facts: Mapping[str, str], panels: Sequence[_Panel], labels: Sequence[str]) -> str:
    rows = [
        f"<tr><th scope='row'>{_text(name)}</th><td colspan='2'>{_text(value)}</td></tr>"
        for name, value in facts.items()
    ]
    rows.append(_before_and_after("A step of"))
    for index, label in enumerate(labels):
        totals = [sum((costs[index] for costs in panel.costs), Cost()) for panel in panels]
        for what, text in (("bytes moved", _bytes), ("operations", _flops)):
            cells = "".join(
                f"<td class='num'>{text(total.bytes if what == 'bytes moved' else total.flops)}</td>"
                for total in totals
            )
            rows.append(f"<tr><th scope='row'>{_text(label)}: {what}</th>{cells}</tr>")
    return f"<div><h2>Sizes</h2><table>{''.join(rows)}</table></div>"


def _kinds(before: Graph, after: Graph) -> str:
    counts = [Counter(node.kind for node in graph.nodes) for graph in (before, after)]
    kinds = sorted(counts[0] | counts[1], key=lambda kind: -max(counts[0][kind], counts[1][kind]))
    rows = [
        f"<tr class='{_class(kind)}'><th scope='row'><span class='tag'>{kind}</span></th>"
        f"<td class='num'>{counts[0][kind] or ''}</td><td class='num'>{counts[1][kind] or ''}</td></tr>"
        for kind in kinds
    ]
    return f"<div><h2>Nodes</h2><table>{_before_and_after('Kind')}{''.join(rows)}</table></div>"


def _before_and_after(what: str) -> str:
    columns = "".join(f"<th scope='col' class='num'>{one}</th>" for one in ("before", "after"))
    return f"<tr><th scope='col'>{what}</th>{columns}</tr>"


def _passes(reports: Sequence[PassReport]) -> str:
    descriptions = {one.name: one.description for one in PASSES}
    parts = [_pass(report, descriptions.get(report.name, "")) for report in reports]
    return f"<section><h2>Passes</h2>{''.join(parts)}</section>"


def _pass(report: PassReport, description: str) -> str:
    before, after = len(report.before.nodes), len(report.after.nodes)
    nodes = f"{before} to {after} nodes" if before != after else f"{after} nodes"
    head = (
        f"<summary><code>{report.name}</code><span>{_text(description)}</span>"
        f"<span class='num'>{_changes(len(report.changes))}</span><span class='num'>{nodes}</span></summary>"
    )
    if not report.changes:
        return f"<details class='pass idle'>{head}<p>There was nothing to do.</p></details>"
    listed = "".join(f"<li>{_text(change)}</li>" for change in report.changes[:MAX_CHANGES])
    more = len(report.changes) - MAX_CHANGES
    listed += f"<li>and {more} more</li>" if more > 0 else ""
    return f"<details class='pass'>{head}<ul class='changes'>{listed}</ul><pre>{_diff(report)}</pre></details>"


def _changes(number: int) -> str:
    return "1 change" if number == 1 else f"{number or 'no'} changes"


def _diff(report: PassReport) -> str:
    lines = report.diff().splitlines()
    classes = {"+": "add", "-": "del"}
    shown = [
        f"<span class='{classes[line[0]]}'>{_text(line)}</span>" if line[:1] in classes else _text(line)
        for line in lines[:MAX_DIFF_LINES]
    ]
    if len(lines) > MAX_DIFF_LINES:
        shown.append(f"... {len(lines) - MAX_DIFF_LINES} more lines")
    return "\n".join(shown)


def _controls(labels: Sequence[str]) -> str:
    views = (("after", "after the passes"), ("before", "as captured"), ("both", "side by side"))
    steps = [(str(index), label) for index, label in enumerate(labels)]
    legend = "".join(f"<span class='{key}'>&#9679; {text}</span>" for key, text in _LEGEND.items())
    return (
        f"<div class='controls'>{_radios('view', 'Network', views)}{_radios('step', 'Bytes and operations for', steps)}"
        "<button type='button' id='expand'>Unfold all</button><button type='button' id='collapse'>Fold all</button>"
        "<input type='search' id='search' placeholder='Name, kind or format ( / )' aria-label='Search nodes'></div>"
        f"<div class='legend'>{legend}</div>"
    )


def _radios(name: str, legend: str, options: Sequence[tuple[str, str]]) -> str:
    checked = [" checked", *("" for _ in options[1:])]
    inputs = "".join(
        f"<label><input type='radio' name='{name}' value='{value}'{mark}> {_text(label)}</label>"
        for mark, (value, label) in zip(checked, options, strict=True)
    )
    return f"<fieldset><legend>{legend}</legend>{inputs}</fieldset>"


# ---- network ---------------------------------------------------------------------------------------------------


def _panel_html(panel: _Panel) -> str:
    timed = " timed" if panel.times else ""
    title = "Before the passes" if panel.key == "before" else "After the passes"
    time_column = "<span class='num'>time</span>" if panel.times else ""
    head = (
        f"<div class='row head'>{passing_svg((), panel.lanes.num_lanes)}<span>node</span><span>kind</span>"
        "<span>output</span><span class='num'>bytes</span><span class='num'>operations</span>"
        f"<span class='num'>per byte</span>{time_column}</div>"
    )
    inputs = "".join(
        f"<div class='row'>{input_svg(lane, panel.lanes.num_lanes)}<span class='name'>{value.name}</span>"
        f"<span class='tag'>input</span><span class='shape'>[{value.rows}]</span></div>"
        for lane, value in enumerate(panel.graph.inputs)
    )
    groups = "".join(_group(panel, name, list(rows)) for name, rows in _groups(panel.graph))
    return (
        f"<section class='panel {panel.key}{timed}' style='--rail: {panel.rail_width}px' aria-label='{title}'>"
        f"<h2>{title}</h2>{head}{inputs}{groups}</section>"
    )


def _groups(graph: Graph) -> Iterator[tuple[str, Iterator[int]]]:
    """Positions of neighbours of one layer; nodes of no layer have the name ''."""

    def layer_of(position: int) -> str:
        match = re.match(r"(.*?\blayers\.\d+)\.", graph.nodes[position].name)
        return match[1] if match else ""

    return itertools.groupby(range(len(graph.nodes)), layer_of)


def _group(panel: _Panel, name: str, positions: Sequence[int]) -> str:
    rows = "".join(_node(panel, position, name) for position in positions)
    if not name:
        return rows
    costs = [sum((panel.costs[one][step] for one in positions), Cost()) for step in range(len(panel.costs[0]))]
    times = [panel.times[name] for name in (panel.graph.nodes[one].name for one in positions) if name in panel.times]
    is_open = " open" if name.rpartition(".")[2] == "0" else ""
    lines = passing_svg(panel.lanes.rows[positions[0]].before, panel.lanes.num_lanes)
    return (
        f"<details class='layer'{is_open}><summary>{lines}"
        f"<span class='name'>{_text(name)}</span><span class='tag'>{len(positions)} nodes</span><span></span>"
        f"{_numbers(costs)}{_time(panel, sum(times) if times else None)}</summary>{rows}</details>"
    )


def _node(panel: _Panel, position: int, prefix: str) -> str:
    node, lanes = panel.graph.nodes[position], panel.lanes.rows[position]
    short = node.name.removeprefix(f"{prefix}.")
    weights = [panel.graph.weights[name] for name in node.weights.values() if name in panel.graph.weights]
    formats = " ".join(dict.fromkeys(one.format for one in weights if len(one.shape) > 1))
    output = next(iter(node.outputs.values()), None)
    shape = "" if output is None else f"[{output.rows}, {output.columns}]" + (" int8" if "int8" in output.dtype else "")
    search = _text(f"{node.name} {node.kind} {formats}".lower())
    num_lanes = panel.lanes.num_lanes
    return (
        f"<details class='op {_class(node.kind)}' data-text='{search}'><summary>{row_svg(lanes, num_lanes)}"
        f"<span class='name' title='{_text(node.name)}'>{_text(short)}</span>"
        f"<span class='tag'>{_text(f'{node.kind} {formats}'.strip())}</span><span class='shape'>{shape}</span>"
        f"{_numbers(panel.costs[position])}{_time(panel, panel.times.get(node.name))}</summary>"
        f"<div class='more'>{passing_svg(lanes.after, num_lanes)}<dl>{_details(panel.graph, node)}</dl></div></details>"
    )


def _details(graph: Graph, node: Node) -> str:
    entries = [("name", node.name)]
    entries += [(f"reads {role}", name) for role, name in node.inputs.items()]
    for role, name in node.weights.items():
        weight = graph.weights.get(name)
        entries.append((role, name if weight is None else f"{name} {list(weight.shape)} {weight.format}"))
        if weight is not None and len(weight.parts) > 1:
            entries.append(("made of", ", ".join(f"{part.name} ({part.num_rows} rows)" for part in weight.parts)))
        if weight is not None and weight.transform != "none":
            entries.append(("transform", weight.transform))
    entries += [(name, str(value)) for name, value in node.attributes.items()]
    entries += [(f"writes {role}", f"{value.name} {value}") for role, value in node.outputs.items()]
    return "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in entries)


def _numbers(costs: Sequence[Cost]) -> str:
    """Bytes, operations, and operations per byte, for each step; CSS shows one of them."""
    columns: tuple[list[str], ...] = ([], [], [])
    for cost in costs:
        columns[0].append(_bytes(cost.bytes))
        columns[1].append(_flops(cost.flops))
        columns[2].append(_ratio(cost.flops / cost.bytes) if cost.bytes and cost.flops else "")
    cells = ("".join(f"<i class='s{index}'>{text}</i>" for index, text in enumerate(column)) for column in columns)
    return "".join(f"<span class='num'>{cell}</span>" for cell in cells)


def _time(panel: _Panel, microseconds: float | None) -> str:
    if not panel.times:
        return ""
    if microseconds is None:
        return "<span class='num'></span>"
    share = 100.0 * microseconds / sum(panel.times.values())
    return f"<span class='num bar' style='--share: {share:.1f}'>{microseconds:,.1f} &#181;s</span>"


def _class(kind: str) -> str:
    return _CLASSES.get(kind, "other")


def _ratio(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"


def _bytes(number: float) -> str:
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}" if number else ""
        number /= 1000
    return f"{number:.3g} GB"


def _flops(number: float) -> str:
    for unit in ("", " k", " M", " G"):
        if number < 1000:
            return f"{number:.3g}{unit}" if number else ""
        number /= 1000
    return f"{number:.3g} T"


def _text(text: str) -> str:
    return html.escape(text, quote=True)
