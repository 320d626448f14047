"""`Backpressure`: how long a refused client should wait. The error handlers put it into the `Retry-After` header."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Final

WINDOW_SECONDS: Final = 10
MAX_SECONDS: Final = 60


class Backpressure:
    """Advises to come back when all who were refused lately would have found a place.

    A place becomes free when a request ends, so that time is the requests refused in the last ten seconds over the
    requests that end in a second. The more clients are turned away, the longer they stay away.

    Args:
        count_finished: requests that have ended since the start.
        clock: seconds.
    """

    def __init__(self, count_finished: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._count_finished = count_finished
        self._clock = clock
        self._seconds: deque[tuple[int, int, int]] = deque()  # second, refused in it, finished before it

    def refuse(self) -> int:
        """Count a refused request; the seconds after which its client should try again, 1 to `MAX_SECONDS`."""
        now = int(self._clock())
        finished = self._count_finished()
        if self._seconds and self._seconds[-1][0] == now:
            second, refused, finished_before = self._seconds.pop()
            self._seconds.append((second, refused + 1, finished_before))
        else:
            self._seconds.append((now, 1, finished))
        while self._seconds[0][0] <= now - WINDOW_SECONDS:
            self._seconds.popleft()
        num_refused = sum(refused for _, refused, _ in self._seconds)
        first_second, _, finished_before = self._seconds[0]
        num_finished = finished - finished_before
        elapsed = 1 + now - first_second
        return min(MAX_SECONDS, math.ceil(num_refused * elapsed / num_finished)) if num_finished > 0 else elapsed
