"""The file that a benchmark leaves in `results/`: rows of numbers, and what they were measured on."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from tokenmill.bench.machine import describe_machine, describe_versions

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
RESULTS = FOLDER / "results"


@dataclass(frozen=True)
class Row:
    """One result.

    Args:
        work: what was run.
        metric, value, unit: what was measured.
        goal: not to fall below, or not to rise above if `is_upper_goal`; None: none was set.
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
    is_upper_goal: bool = True

    @property
    def is_reached(self) -> bool:
        """Whether the value is on the right side of the goal."""
        if self.goal is None:
            return True
        return self.value <= self.goal if self.is_upper_goal else self.value >= self.goal

    def to_dict(self) -> dict[str, object]:
        """As it stands in the file."""
        values = asdict(self)
        del values["is_upper_goal"]
        return values


def write_result(path: Path, benchmark: str, rows: Sequence[Row], *, device: str | None = None) -> None:
    """Write the file; its folder is made. `device` is the processor if not given."""
    machine = describe_machine()
    result = {
        "benchmark": benchmark,
        "device": device or f"{machine.cpu}, {machine.num_cores} cores",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "versions": describe_versions(),
        "rows": [row.to_dict() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def print_rows(rows: Sequence[Row]) -> None:
    """The results as a table."""
    for row in rows:
        note = ""
        if row.goal is not None:
            sign = "<=" if row.is_upper_goal else ">="
            note = f"goal {sign} {row.goal:g} {'reached' if row.is_reached else 'MISSED'}"
        print(f"{row.work:34} {row.metric:44} {row.value:12,.3f} {row.unit:14} {note}")


def commit() -> str:
    """The source tree's commit, with `-dirty` if it was changed; `unknown` outside a repository."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
