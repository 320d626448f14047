"""Timing caches survive files, builds at the same time, and what others write into them."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tokenmill.errors import EngineFileError
from tokenmill.program.timing_cache import TimingCache

pytestmark = pytest.mark.spec("D3")


def cache(**times: float) -> TimingCache:
    found = TimingCache()
    found.add("here", "k", times)
    return found


def test_the_fastest_variant() -> None:
    found = cache(a=3.0, b=2.0, c=2.5)
    assert found.fastest("here", "k") == "b"
    assert found.fastest("there", "k") is None
    assert found.fastest("here", "other") is None


def test_a_cache_survives_its_text() -> None:
    found = cache(a=3.0, b=2.5)
    assert TimingCache.decode(found.encode(), "x") == found
    assert TimingCache.decode(TimingCache().encode(), "x") == TimingCache()


def test_files_are_added_to(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "timing.cache"
    assert TimingCache.load(path) == TimingCache()
    cache(a=1.0).save_into(path)
    other = TimingCache()
    other.add("there", "k", {"b": 2.0})
    other.save_into(path)
    cache(a=4.0).save_into(path)
    assert TimingCache.load(path).times == {"here": {"k": {"a": 4.0}}, "there": {"k": {"b": 2.0}}}


def test_builds_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"

    def work(number: int) -> None:
        own = TimingCache()
        own.add(f"machine {number}", "k", {"a": 1.0 + number})
        own.save_into(path)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(TimingCache.load(path).times) == 8


@pytest.mark.parametrize(
    "content",
    [
        "",
        "nonsense",
        "[]",
        "{}",
        '{"format": "tokenmill-timing-cache", "version": 2, "times": {}}',
        '{"format": "tokenmill-timing-cache", "version": 1}',
        '{"format": "tokenmill-timing-cache", "version": 1, "times": []}',
        '{"format": "tokenmill-timing-cache", "version": 1, "times": {"m": []}}',
        '{"format": "tokenmill-timing-cache", "version": 1, "times": {"m": {"k": 3}}}',
        '{"format": "tokenmill-timing-cache", "version": 1, "times": {"m": {"k": {}}}}',
        '{"format": "tokenmill-timing-cache", "version": 1, "times": {"m": {"k": {"a": "fast"}}}}',
        '{"format": "tokenmill-timing-cache", "version": 1, "times": {"m": {"k": {"a": -1}}}}',
        '{"format": "tokenmill-timing-cache", "version": 1, "times": {"m": {"k": {"a": Infinity}}}}',
    ],
)
def test_what_is_no_cache_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "timing.cache"
    path.write_text(content)
    with pytest.raises(EngineFileError) as caught:
        TimingCache.load(path)
    assert str(path) in str(caught.value)
    with pytest.raises(EngineFileError):
        cache(a=1.0).save_into(path)
    assert path.read_text() == content


def test_entries_are_sorted(tmp_path: Path) -> None:
    both: dict[str, Any] = json.loads(cache(b=2.0, a=1.0).encode())
    assert list(both["times"]["here"]["k"]) == ["a", "b"]


def test_a_full_disk_leaves_the_old_cache_and_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "timing.cache"
    first, second = TimingCache(), TimingCache()
    first.add("machine", "key", {"a": 1.0})
    second.add("machine", "other", {"a": 2.0})
    first.save_into(path)
    before = sorted(path.name for path in tmp_path.iterdir())

    def write_bytes(partial: Path, content: bytes) -> int:
        with partial.open("wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(EngineFileError, match="cannot be written: No space left on device"):
        second.save_into(path)
    assert TimingCache.load(path).times == first.times
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_directory_is_no_timing_cache(tmp_path: Path) -> None:
    with pytest.raises(EngineFileError, match=r"Is a directory\. Name another file"):
        TimingCache.load(tmp_path)
