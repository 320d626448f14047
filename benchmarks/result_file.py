"""The file that a benchmark leaves in `results/`: rows of numbers, and what they were measured on."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from tokenmill.bench.machine import describe_machine, describe_versions

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
RESULTS = FOLDER / "results"
COMMIT_FILE = "COMMIT"
"""In the root of a tree that has no repository: what `git describe --always --dirty` said where it came from."""


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
    write_document(path, {**describe_run(benchmark, device), "rows": [row.to_dict() for row in rows]})


def write_document(path: Path, document: Mapping[str, object]) -> None:
    """Write what a benchmark found; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def describe_run(benchmark: str, device: str | None = None, **versions: str) -> dict[str, object]:
    """What stands above the rows: what ran, when, and on what.

    Args:
        benchmark: name of the script.
        device: what was measured; the processor if not given.
        versions: of other libraries, by name.
    """
    machine = describe_machine()
    return {
        "benchmark": benchmark,
        "device": device or f"{machine.cpu}, {machine.num_cores} cores",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command_line(sys.orig_argv),
        "versions": {**describe_versions(), **versions},
    }


def print_rows(rows: Sequence[Row]) -> None:
    """The results as a table."""
    for row in rows:
        note = ""
        if row.goal is not None:
            sign = "<=" if row.is_upper_goal else ">="
            note = f"goal {sign} {row.goal:g} {'reached' if row.is_reached else 'MISSED'}"
        print(f"{row.work:34} {row.metric:44} {row.value:12,.3f} {row.unit:14} {note}")


def commit(root: Path = ROOT) -> str:
    """The commit of the source tree below `root`, with `-dirty` if it was changed.

    A tree without a repository of its own (an export, a copy on another machine) may say it in a file `COMMIT`; the
    commit of a repository around it is not meant. `unknown` if nothing says it.
    """
    if _git(root, "rev-parse", "--show-toplevel") == str(root.resolve()):
        return _git(root, "describe", "--always", "--dirty", "--exclude=*") or "unknown"
    file = root / COMMIT_FILE
    return (file.read_text(encoding="utf-8").strip() if file.is_file() else "") or "unknown"


def _git(root: Path, *arguments: str) -> str:
    """What git says; empty if it fails or is not there."""
    try:
        found = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def command_line(arguments: Sequence[str], root: Path = ROOT) -> str:
    """The command as somebody else would type it in the root of the repository.

    The interpreter is called python, paths below `root` are relative to it, and of other paths only the name is kept:
    where a machine has its files is nobody's business.
    """
    return shlex.join(["python", *(_public(argument, root) for argument in arguments[1:])])


def _public(argument: str, root: Path) -> str:
    option, equals, value = argument.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={_public(value, root)}"
    if not argument.startswith(("/", "~", "..")):
        return argument
    path = Path(argument).expanduser().resolve()
    return str(path.relative_to(root.resolve())) if path.is_relative_to(root.resolve()) else path.name
