"""Results of benchmarks: one `Row` for each number, one JSON file for each script, in one format."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from tokenmill.bench.machine import describe_versions

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One result.

    Args:
        work: what was run.
        metric, value, unit: what was measured.
        goal: what is aimed at; None: nothing was set.
        peer: what other systems reach, by name.
        limit: what the machine allows; None: does not apply.
    """

    work: str
    metric: str
    value: float
    unit: str
    goal: float | None = None
    peer: dict[str, float] | None = None
    limit: float | None = None


def write_results(benchmark: str, device: str, rows: Sequence[Row], output: Path | None = None) -> Path:
    """Write the file of one benchmark; returns its path (`results/<benchmark>.json` unless given)."""
    path = output or RESULTS / f"{benchmark}.json"
    result = {
        "benchmark": benchmark,
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "versions": describe_versions(),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def commit() -> str:
    """The checkout's commit, with `+` when it has changes; `unknown` outside a checkout."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_rows(rows: Sequence[Row]) -> None:
    """A plain table on standard output."""
    for row in rows:
        goal = f"  goal {row.goal:,.4g}" if row.goal is not None else ""
        limit = f"  limit {row.limit:,.4g}" if row.limit is not None else ""
        print(f"{row.work:44} {row.metric:28} {row.value:12,.3f} {row.unit}{goal}{limit}")


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=True
    ).stdout.strip()
