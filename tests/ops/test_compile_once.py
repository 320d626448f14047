"""Who needs a kernel that another thread compiles waits for it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")
from triton import knobs

from tokenmill.ops.compile_once import compile_once

KERNEL = SimpleNamespace(module="m", name="kernel")
OTHER = SimpleNamespace(module="m", name="other")


def asked(fn: Any, key: str) -> tuple[threading.Thread, list[object]]:
    """A thread that is about to compile, and what it was told."""
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(knobs.runtime.jit_cache_hook(key=key, fn=fn, repr="")))
    thread.start()
    return thread, answers


def test_the_second_thread_waits() -> None:
    with compile_once():
        first, answers = asked(KERNEL, "a")
        first.join(10)
        assert answers == [False]
        second, later = asked(KERNEL, "a")
        for free, fn, key in ((True, KERNEL, "b"), (True, OTHER, "a"), (False, KERNEL, "a")):
            thread, told = asked(fn, key)
            thread.join(10 if free else 0.05)
            assert told == ([False] if free else [])
        assert later == []
        knobs.runtime.jit_post_compile_hook(key="a", fn=KERNEL, repr="")
        second.join(10)
        thread.join(10)
        assert later == told == [False]
    assert knobs.runtime.jit_cache_hook is None and knobs.runtime.jit_post_compile_hook is None


def test_hooks_of_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(**_: object) -> bool:
        return False

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", hook)
    with compile_once():
        assert knobs.runtime.jit_cache_hook is hook
    assert knobs.runtime.jit_cache_hook is hook
