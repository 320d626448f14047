"""The rows of `benchmarks.gpu.llama8b` for both modes; what they measure needs a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.gpu import llama8b
from benchmarks.result_file import Row


def test_both_modes_are_written_as_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []

    def measure(shape: Any, options: Any, weights: str, write: Callable[[list[Row]], None]) -> list[Row]:
        modes.append(options.deterministic)
        rows = [Row("Llama 8B fp8", "engine start to first token", 12.0, "s", goal=20.0)]
        for work in ("128/128/2048", "128/128/1"):
            rows.append(Row(f"Llama 8B fp8 {work}", "output tokens/s", 7.0 + len(modes), "tokens/s", goal=29000.0))
            write(rows)
        return rows

    monkeypatch.setattr(llama8b, "measure_engine", measure)
    written: list[list[Row]] = []
    options = argparse.Namespace(deterministic=True)
    rows = llama8b.measure_both_modes(llama8b.LLAMA, options, "fp8", written.append)
    assert modes == [True, False]
    assert [len(found) for found in written] == [1, 2, 3, 4] and written[-1] == rows, "what is cut off is not lost"
    assert [(row.metric, row.value, row.goal) for row in rows] == [
        *[("output tokens/s, deterministic", 8.0, None)] * 2,
        *[("output tokens/s", 9.0, 29000.0)] * 2,
    ], "starts are left out"
