"""What the pages tell a reader to type exists, their Python compiles and imports, and their links lead somewhere."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.support.documents import code_blocks, heading_anchors, link_targets, pages, shell_commands
from tests.support.source_tree import ROOT
from tokenmill.executor import Executor

README = (ROOT / "README.md").read_text(encoding="utf-8")

OUTSIDE_COMMANDS = {"curl", "source", "git"}

# Folders that exist on one machine only, and symbols outside the text that everyone can read.
MACHINE_PATH = re.compile(r"(?<![\w.}~-])/(?:root|home|work|Users|mnt)/")
NOT_TEXT = re.compile(r"[\U0001F000-\U0001FAFF\u2600-\u27BF\u2B50\uFE0F]")

TEXT_FILES = ("*.py", "*.md", "*.toml", "*.txt", "*.sh", "*.yaml", "*.yml", "*.json", "*.html")
TEXT_FOLDERS = ("tokenmill", "tests", "scripts", "docs", "examples", "benchmarks", ".ci")


def page_id(path: Path) -> str:
    """A page's name for the test report."""
    return path.relative_to(ROOT).as_posix()


def command_of(line: str) -> list[str]:
    """The words of a command line, settings of variables in front of it left out."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def commands_on_pages() -> list[tuple[str, str]]:
    """(page, command line) for everything in `bash` blocks."""
    return [(page_id(page), line) for page in pages() for line in shell_commands(page.read_text(encoding="utf-8"))]


def subcommands_of_tokenmill() -> list[tuple[str, ...]]:
    """Every `tokenmill X` and `tokenmill bench X` that a page tells the reader to type, once each."""
    found = set()
    for _, line in commands_on_pages():
        words = command_of(line)
        if words[0] == "scripts/run":
            words = ["tokenmill", "run"]
        if Path(words[0]).name == "tokenmill":
            num_words = 2 if words[1] == "bench" else 1
            found.add(tuple(words[1 : 1 + num_words]))
    return sorted(found)


@pytest.mark.parametrize(("page", "line"), commands_on_pages())
def test_every_command_exists(page: str, line: str) -> None:
    words = command_of(line)
    if words[0].startswith("scripts/"):
        assert os.access(ROOT / words[0], os.X_OK), f"{page} names {words[0]}, which is not an executable file"
    else:
        assert Path(words[0]).name in {"tokenmill", *OUTSIDE_COMMANDS}, f"{page} names the unknown command {words[0]}"


def test_the_two_first_commands_are_those_of_ci() -> None:
    lines = shell_commands(README)
    assert lines[:2] == ['scripts/run "Why is the sky blue?"', "scripts/test"]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in ci if line.startswith("scripts/")] == ["scripts/check", "scripts/test"]
    assert "set -euo pipefail" in ci
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def run_tokenmill(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a fresh interpreter."""
    code = f"import sys; sys.argv = {['tokenmill', *arguments]!r}; from tokenmill.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.spec("A3")
@pytest.mark.parametrize("words", subcommands_of_tokenmill(), ids=" ".join)
def test_every_subcommand_has_help(words: tuple[str, ...]) -> None:
    done = run_tokenmill(*words, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert words[-1] in done.stdout


def test_an_unknown_subcommand_fails() -> None:
    assert run_tokenmill("no-such-command", "--help").returncode not in (0, 1)


def test_help_names_what_the_readme_names() -> None:
    done = run_tokenmill("--help")
    assert done.returncode == 0, done.stderr
    assert [words for words in subcommands_of_tokenmill() if words[0] not in done.stdout] == []


@pytest.mark.parametrize("page", pages(), ids=page_id)
def test_python_blocks_compile_and_import(page: Path) -> None:
    for block in code_blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                missing = [alias.name for alias in node.names if not hasattr(import_module(node.module), alias.name)]
                assert not missing, f"{node.module} has no {missing}"


@pytest.mark.parametrize("page", pages(), ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in link_targets(page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file_name, _, anchor = target.partition("#")
        file = (page.parent / file_name).resolve() if file_name else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in heading_anchors(file.read_text(encoding="utf-8")), f"no heading for {target}"


def text_files() -> list[Path]:
    """Every text file of the project."""
    found = [path for pattern in TEXT_FILES for path in ROOT.glob(pattern)]
    for folder in TEXT_FOLDERS:
        found += [path for pattern in TEXT_FILES for path in (ROOT / folder).rglob(pattern)]
    return [*found, *(ROOT / "scripts").glob("[a-z]*[!.]"), ROOT / ".ci" / "run"]


def test_the_page_of_the_low_level_executor_names_all_methods() -> None:
    page = (ROOT / "docs" / "low-level-executor.md").read_text(encoding="utf-8")
    methods = [name for name in vars(Executor) if not name.startswith("_")]
    assert "await_responses" in methods
    assert [name for name in methods if f"`{name}`" not in page] == []


def test_no_file_names_one_machine_or_draws_pictures_in_text() -> None:
    found = []
    for path in text_files():
        if path.is_file():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if MACHINE_PATH.search(line) or NOT_TEXT.search(line):
                    found.append(f"{page_id(path)}:{number}: {line.strip()}")
    assert not found, "\n".join(["", *found])


def test_a_machine_path_is_found() -> None:
    folder = "work"
    assert MACHINE_PATH.search(f"see /{folder}/models/a.gguf")
    assert not MACHINE_PATH.search("https://example.org/home/page and ~/home/x")
