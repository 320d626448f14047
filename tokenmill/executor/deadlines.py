"""`DeadlineTimer`: calls when a request's time is over, even when its engine is busy or stuck."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Container
from typing import Final

from tokenmill.executor.managed_thread import ManagedThread

_MIN_ENTRIES: Final = 1000  # below this many, requests that ended are not worth looking for


class DeadlineTimer:
    """Deadlines by request. Its thread is started with the first deadline.

    Args:
        open_requests: requests that are under way; those that ended are forgotten now and then.
        on_expired: called with a request id on the timer's thread, even if the request has ended.
        on_error: called when the timer fails.
    """

    def __init__(
        self,
        open_requests: Container[int],
        on_expired: Callable[[int], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._open_requests = open_requests
        self._on_expired = on_expired
        self._max_entries = _MIN_ENTRIES
        self._heap: list[tuple[float, int]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = ManagedThread(self._run, name="tokenmill-deadlines", on_error=on_error)
        self._has_started = False

    def add(self, request_id: int, deadline: float) -> None:
        """Call for `request_id` at `deadline` (seconds of `time.monotonic`)."""
        with self._changed:
            heapq.heappush(self._heap, (deadline, request_id))
            if len(self._heap) > self._max_entries:
                self._heap = [entry for entry in self._heap if entry[1] in self._open_requests]
                heapq.heapify(self._heap)
                self._max_entries = max(_MIN_ENTRIES, 2 * len(self._heap))
            if not self._has_started and not self._closed:
                self._has_started = True
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """No more calls once this returns (unless it is called by one)."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (request_id := self._wait_for_next()) is not None:
            self._on_expired(request_id)

    def _wait_for_next(self) -> int | None:
        with self._changed:
            while not self._closed:
                left = self._heap[0][0] - time.monotonic() if self._heap else None
                if left is not None and left <= 0.0:
                    return heapq.heappop(self._heap)[1]
                self._changed.wait(left)
            return None
