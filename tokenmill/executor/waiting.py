"""Waits of callers' threads, in slices, so that Ctrl-C is always noticed. Used by results, executors and their threads.

Python runs the handler of a signal on the main thread, between two instructions or when the signal interrupts a wait. A
signal that comes just before a wait begins, or that the system gives to another thread, does neither: its handler runs
when the wait is over, which may be a minute later or never.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

Item = TypeVar("Item")

SLICE_SECONDS: Final = 0.5
"""Longest time that a signal stays unnoticed."""


def wait_for(changed: threading.Condition, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
    """Wait under the lock of `changed` until `predicate` holds; False if it does not within `timeout` seconds."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while not changed.wait_for(predicate, _slice(deadline)):
        if deadline is not None and time.monotonic() >= deadline:
            return False
    return True


def get(items: queue.SimpleQueue[Item], timeout: float | None = None) -> Item:
    """The next item of a queue.

    Raises:
        queue.Empty: none came within `timeout` seconds.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        try:
            return items.get(timeout=_slice(deadline))
        except queue.Empty:
            if deadline is not None and time.monotonic() >= deadline:
                raise


def join(thread: threading.Thread, timeout: float | None = None) -> bool:
    """Wait for the end of a thread; False if it does not come within `timeout` seconds."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while thread.is_alive() and (deadline is None or time.monotonic() < deadline):
        thread.join(_slice(deadline))
    return not thread.is_alive()


def _slice(deadline: float | None) -> float:
    return SLICE_SECONDS if deadline is None else min(SLICE_SECONDS, max(0.0, deadline - time.monotonic()))
