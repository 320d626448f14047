"""The ratio and the goals of the comparison, at known measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.ipc_overhead import IN_PROCESS, WORKER, Turn, make_rows
from benchmarks.result_file import Row, write_result


def turns(*throughputs: float, first_token: float = 2.0) -> list[Turn]:
    return [Turn(value, first_token, 10.0) for value in throughputs]


def value(rows: list[Row], metric: str) -> Row:
    [row] = [row for row in rows if row.metric == metric]
    return row


def test_ratio_is_taken_within_rounds() -> None:
    """A slow round of both, on a busy machine, changes nothing."""
    rows = make_rows({IN_PROCESS: turns(100, 50, 100), WORKER: turns(98, 49, 98)}, "work")
    row = value(rows, "throughput, worker process over in process")
    assert row.value == pytest.approx(0.98)
    assert row.is_reached
    assert value(rows, f"output throughput, {IN_PROCESS}").value == 100


def test_missed_goals() -> None:
    slow = make_rows({IN_PROCESS: turns(100, 100), WORKER: turns(96, 96)}, "work")
    assert [row.metric for row in slow if not row.is_reached] == ["throughput, worker process over in process"]
    late = make_rows({IN_PROCESS: turns(100), WORKER: turns(100, first_token=3.5)}, "work")
    assert [row.metric for row in late if not row.is_reached] == ["worker process later by"]


def test_result_file(tmp_path: Path) -> None:
    path = tmp_path / "results" / "ipc_overhead.json"
    write_result(path, "ipc_overhead", [Row("work", "metric", 1.5, "s", 2.0), Row("work", "other", 1.0, "")])
    result = json.loads(path.read_text())
    assert list(result) == ["benchmark", "device", "date", "commit", "command", "versions", "rows"]
    assert list(result["rows"][0]) == ["work", "metric", "value", "unit", "goal", "peer", "limit"]
    assert result["rows"][1]["goal"] is None
