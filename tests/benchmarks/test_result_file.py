"""What a result file says of the run: the right commit, and nothing about where a machine has its files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import result_file
from benchmarks.result_file import COMMIT_FILE, ROOT, Row, command_line, commit, write_result

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(folder: Path) -> Path:
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "file.py").write_text("1\n")
    git(folder, "add", "file.py")
    git(folder, "-c", "core.hooksPath=/dev/null", "commit", "--quiet", "-m", "One")
    return folder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/opt/env/bin/python3", "-m", "benchmarks.soak", "--minutes", "1"], "python -m benchmarks.soak --minutes 1"),
        (["python", "benchmarks/cpu/ops.py"], "python benchmarks/cpu/ops.py"),
        (["python", f"{ROOT}/benchmarks/cpu/ops.py"], "python benchmarks/cpu/ops.py"),
        (["python", "-m", "b", "--llama-python", "/opt/env/bin/python"], "python -m b --llama-python python"),
        (["python", "-m", "b", "--output=/tmp/mine/out.json"], "python -m b --output=out.json"),
        (["python", "-m", "b", "--output", f"{ROOT}/results/x.json"], "python -m b --output results/x.json"),
        (["python", "-m", "b", "~/models/a.gguf"], "python -m b a.gguf"),
        (["python", "-m", "b", "../elsewhere/a.gguf"], "python -m b a.gguf"),
        (["python", "-m", "b", "--work", "128/128/1", "two words"], "python -m b --work 128/128/1 'two words'"),
    ],
)
def test_a_command_names_no_place_on_the_machine(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert command_line(arguments) == expected


@needs_git
def test_the_commit_is_that_of_the_trees_own_repository(tmp_path: Path) -> None:
    root = repository(tmp_path / "tree")
    head = git(root, "rev-parse", "--short", "HEAD")
    (root / COMMIT_FILE).write_text("abc1234\n")  # an old one: the repository knows better
    assert commit(root) == head
    (root / "file.py").write_text("2\n")
    assert commit(root) == f"{head}-dirty"


@needs_git
def test_a_tree_without_a_repository_says_its_commit_in_a_file(tmp_path: Path) -> None:
    export = repository(tmp_path / "around") / "export"
    export.mkdir()
    assert commit(export) == "unknown", "the repository around it is another"
    (export / COMMIT_FILE).write_text("abc1234-dirty\n")
    assert commit(export) == "abc1234-dirty"
    (export / COMMIT_FILE).write_text("\n")
    assert commit(export) == "unknown"


def test_a_machine_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) == "unknown"
    (tmp_path / COMMIT_FILE).write_text("abc1234\n")
    assert commit(tmp_path) == "abc1234"


def test_a_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_file, "commit", lambda: "abc1234")
    monkeypatch.setattr(sys, "orig_argv", ["/opt/env/bin/python", "-m", "benchmarks.x", "--output", str(tmp_path)])
    path = tmp_path / "new" / "x.json"
    write_result(path, "x", [Row("a work", "time", 1.5, "s", goal=2.0)])
    written = json.loads(path.read_text())
    assert list(written) == ["benchmark", "device", "date", "commit", "command", "versions", "rows"]
    assert (written["commit"], written["command"]) == ("abc1234", f"python -m benchmarks.x --output {tmp_path.name}")
    assert set(written["versions"]) == {"tokenmill", "torch", "python"}
    assert written["rows"] == [
        {"work": "a work", "metric": "time", "value": 1.5, "unit": "s", "goal": 2.0, "peer": None, "limit": None}
    ]
