"""The tables of the benchmarks' page say what the result files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table
from benchmarks.result_file import RESULTS
from benchmarks.table import PAGE, figures, new_page, number, page_with, read_results, runs


def result(device: str, *rows: dict[str, Any]) -> dict[str, Any]:
    values = {"work": "a|b", "metric": "time", "value": 1.0, "unit": "s", "goal": None, "peer": None, "limit": None}
    return {
        "device": device,
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef-dirty",
        "rows": [{**values, **row} for row in rows],
    }


def test_the_page_is_what_the_files_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == new_page(PAGE), "python -m benchmarks.table writes the tables"


def test_every_result_is_named_with_its_script() -> None:
    page = PAGE.read_text(encoding="utf-8").partition("## Results")[0]
    assert [path.name for path in RESULTS.glob("*.json") if f"`results/{path.name}`" not in page] == []


def test_figures() -> None:
    peers = {"peer": {"vLLM": 6.468, "other": 1234.5}, "limit": 4.9, "goal": 5}
    results = {
        "whole": result("NVIDIA", {"value": 12345.6, "unit": "tokens/s"}, peers),
        "soak": result("AMD", {"value": 7}, {"value": 0.5, "unit": "1", "goal": 0.75}),
    }
    assert figures(results).splitlines()[2:] == [
        "| a/b | time | 12,346 tokens/s |  |  |  | `whole` |",
        "| a/b | time | 1 s | 5 | vLLM 6.468, other 1,234 | 4.9 | `whole` |",
        "| a/b | time | 0.5 | 0.75 |  |  | `soak` |",
    ]


def test_runs() -> None:
    (row,) = runs({"one": result("AMD", {}, {})}).splitlines()[2:]
    assert row == "| [`one`](results/one.json) | AMD | 2026-01-02 | 0123456-dirty | 2 |"


def test_whole_systems_and_gpus_come_first(tmp_path: Path) -> None:
    for name, device in (("gpu_ops", "NVIDIA"), ("cpu_compare", "AMD"), ("soak", "AMD"), ("z", "NVIDIA")):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(device)))
    assert list(read_results(tmp_path)) == ["z", "cpu_compare", "soak", "gpu_ops"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3.0, "3"), (0.92481, "0.9248"), (99.996, "100"), (382.559, "383"), (2.5e9, "2,500,000,000"),
     (3.39356e14, "339.4e12"), (-1234.4, "-1,234")],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    page = "a\n<!-- t: written by python -m benchmarks.table -->\nold\n<!-- end of t -->\nb\n"
    once = page_with(page, {"t": "new"})
    assert once.splitlines() == ["a", page.splitlines()[1], "", "new", "", "<!-- end of t -->", "b"]
    assert page_with(once, {"t": "new"}) == once


@pytest.mark.parametrize("page", ["", "<!-- end of t -->\n<!-- t: written by python -m benchmarks.table -->"])
def test_a_page_without_marks(page: str) -> None:
    with pytest.raises(ValueError, match="end of t"):
        page_with(page, {"t": "new"})


def test_main_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "README.md"
    head, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- end of figures -->")
    page.write_text(f"{head}stale\n<!-- end of figures -->{rest}", encoding="utf-8")
    monkeypatch.setattr(table, "PAGE", page)
    table.main()
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
