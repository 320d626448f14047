"""Environment variables and their defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenmill.env import read_environment


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TOKENMILL_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/tokenmill")),
        ({"TOKENMILL_CACHE": "", "XDG_CACHE_HOME": ""}, Path.home() / ".cache" / "tokenmill"),
        ({}, Path.home() / ".cache" / "tokenmill"),
        ({"TOKENMILL_CACHE": "~/models"}, Path.home() / "models"),
    ],
)
def test_cache_dir(variables: dict[str, str], expected: Path) -> None:
    assert read_environment(variables).cache_dir == expected


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", "/somewhere")
    assert read_environment().cache_dir == Path("/somewhere")
