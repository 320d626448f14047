"""`compile_once`: while threads run kernels for the first time, each kernel is compiled by one of them.

Triton does not know that another thread is compiling the kernel that this one wants, so both would. With its hooks
around compilation the second thread waits, and then finds the kernel in triton's cache on disk. Called by
`runtime.warm_up`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from threading import Event, Lock
from typing import Any

LONGEST_COMPILATION = 60.0
"""Seconds after which a thread compiles the kernel itself: the other one may have failed."""


class _Underway:
    """The kernels that some thread compiles, or has compiled."""

    def __init__(self) -> None:
        self._events: dict[Hashable, Event] = {}
        self._lock = Lock()

    def before(self, *, key: Hashable, fn: Any, **_: object) -> bool:
        """Wait if another thread is at it. False: go on and compile, or read what was compiled."""
        with self._lock:
            known = self._events.get((fn.module, fn.name, key))
            if known is None:
                self._events[fn.module, fn.name, key] = Event()
        if known is not None:
            known.wait(LONGEST_COMPILATION)
        return False

    def after(self, *, key: Hashable, fn: Any, **_: object) -> bool:
        """Let the others go on."""
        self._events[fn.module, fn.name, key].set()
        return False


@contextmanager
def compile_once() -> Iterator[None]:
    """Within the block. Does nothing where somebody else has set hooks."""
    from triton import knobs

    runtime = knobs.runtime
    if runtime.jit_cache_hook is not None or runtime.jit_post_compile_hook is not None:
        yield
        return
    underway = _Underway()
    runtime.jit_cache_hook, runtime.jit_post_compile_hook = underway.before, underway.after
    try:
        yield
    finally:
        runtime.jit_cache_hook = runtime.jit_post_compile_hook = None
