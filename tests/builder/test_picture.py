"""The picture: complete, self-contained, sound HTML; lines that run from where values are computed to the last use."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.support.programs import ARCHITECTURES, captured, tiny_model
from tests.support.tiny_checkpoint import write_tiny_model
from tokenmill.builder.build import build
from tokenmill.builder.graph import Graph, assign_formats
from tokenmill.builder.passes import PassReport, run_passes
from tokenmill.builder.picture import DEFAULT_STEPS, graph_html
from tokenmill.builder.picture_lanes import lay_out

VOID = ("meta", "input", "circle", "path")


class Page(HTMLParser):
    """Tags in balance, attributes, and the text of each element of a class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._class = ""
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        self._class = dict(attrs).get("class") or ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._class, []).append(data)

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [given for _, given in self.attributes if name in (given.get("class") or "").split()]


def compiled(name: str) -> tuple[Graph, Graph, list[PassReport]]:
    graph = captured(tiny_model(name))
    parts = [part for weight in graph.weights.values() if len(weight.shape) == 2 for part in weight.parts]
    before = assign_formats(graph, {part.name: "q8_0" for part in parts if "proj" in part.name})
    after, reports = run_passes(before)
    return before, after, reports


@pytest.mark.spec("D5")
def test_the_page_shows_every_node_before_and_after() -> None:
    before, after, reports = compiled("qwen3")
    page = Page(graph_html("tiny <qwen3>", before, after, reports))
    assert len(page.with_class("op")) == len(before.nodes) + len(after.nodes)
    assert len(page.with_class("layer")) == 2 * 3
    assert [text for text in page.texts[""] if "qwen3" in text][:2] == ["tiny <qwen3>: network", "tiny <qwen3>"]
    titles = [given.get("title") for given in page.with_class("name")]
    assert {node.name for graph in (before, after) for node in graph.nodes} <= set(titles)
    assert [given for _, given in page.attributes if given.get("aria-label") == "After the passes"]


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = graph_html("model", *compiled("llama"))
    assert not re.findall(r"(?:src|href|url|@import|https?:)\W", text)
    tags = {tag for tag, _ in Page(text).attributes}
    assert tags.isdisjoint({"link", "img", "iframe", "object", "embed"})


def test_every_pass_is_listed_with_its_changes() -> None:
    before, after, reports = compiled("gemma3")
    page = Page(graph_html("model", before, after, reports))
    passes = page.with_class("pass")
    assert len(passes) == len(reports)
    assert sum("idle" in (given["class"] or "") for given in passes) == sum(not report.changes for report in reports)
    assert any(line.startswith("-%") for line in page.texts["del"])
    assert any(line.startswith("+%") for line in page.texts["add"])


def test_times_are_shown_where_they_were_measured() -> None:
    before, after, reports = compiled("llama")
    without = graph_html("model", before, after, reports)
    times = {"model.layers.0.mlp.down_proj": 30.0, "lm_head": 10.0}
    page = graph_html("model", before, after, reports, times=times)
    assert "&#181;s" not in without
    bars = re.findall(r"--share: ([\d.]+)'>([\d.,]+) &#181;s", page)
    assert bars == [("75.0", "30.0"), ("75.0", "30.0"), ("25.0", "10.0")]  # the layer, its node, the head


def test_numbers_are_there_for_every_step() -> None:
    before, after, reports = compiled("llama")
    text = graph_html("model", before, after, reports, facts={"weights": "1 & 2"})
    assert "1 &amp; 2" in text
    for label in DEFAULT_STEPS:
        assert text.count(label) == 3  # two rows of the table, one switch
    assert [f".s{index} {{ display: none" in text for index in range(4)] == [True, True, True, False]


def test_built_engines_hold_their_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))
    engine = build(write_tiny_model(tmp_path / "tiny"), device="cuda", max_num_tokens=64)
    engine.save(tmp_path / "engine")
    page = Page((tmp_path / "engine" / "graph.html").read_text(encoding="utf-8"))
    titles = {given.get("title") for given in page.with_class("name")}
    assert {operation.name for operation in engine.program.operations} <= titles
    assert any("for 64 tokens" in text for texts in page.texts.values() for text in texts)
    assert list((tmp_path / "cache" / "captures").iterdir())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lines_connect_every_value_with_its_readers(name: str) -> None:
    for graph in compiled(name)[:2]:
        lanes = lay_out(graph)
        alive = {value.name: lane for lane, value in enumerate(graph.inputs)}
        users = {value: list(nodes) for value, nodes in graph.users().items()}
        for node, row in zip(graph.nodes, lanes.rows, strict=True):
            assert sorted(alive.values()) == list(row.before)
            read = [name for name in (*node.inputs.values(), *node.weights.values()) if name in users]
            assert {alive[name] for name in read} == set(row.incoming)
            for value in read:
                users[value].remove(node)
            ordered = sorted(node.outputs.values(), key=lambda one: one is not node.outputs.get("sum"))
            for value in dict.fromkeys(read):
                if not users[value] and value != graph.output:
                    del alive[value]
            for value, lane in zip(ordered, row.outgoing, strict=True):
                if users[value.name] or value.name == graph.output:
                    assert lane not in alive.values()
                    alive[value.name] = lane
            assert sorted(alive.values()) == list(row.after)
            assert set(row.passing) == {lane for lane in row.before if lane in row.after} - set(row.outgoing)
            assert max((*row.before, *row.after, row.node)) < lanes.num_lanes


def test_the_residual_stream_is_a_straight_line() -> None:
    """What a product or a norm adds to the stream leaves the stream in its lane."""
    for name, kind, role in (("llama", "linear", "y"), ("gemma3", "add_rms_norm", "sum")):
        graph = compiled(name)[1]
        rows = lay_out(graph).rows
        lanes = {
            rows[position].outgoing[0]
            for position, node in enumerate(graph.nodes)
            if node.kind == kind and "residual" in node.inputs and node.outputs[role].rows == "tokens"
        }
        assert lanes == {0}
