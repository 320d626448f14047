"""`IterationResultQueue`: the records of the latest steps, for whoever wants each of them once.

Reading takes records out. Metrics are snapshots (`GenerationExecutor.stats`) and never come from here, so a reader of
records and a scraper of metrics do not disturb each other.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable

from tokenmill.telemetry.stats import IterationStats


class IterationResultQueue:
    """A bounded queue; when it is full the oldest record is dropped. Any thread may write, any may read.

    Args:
        max_records: how many are kept.
    """

    def __init__(self, max_records: int = 1000) -> None:
        self._records: deque[IterationStats] = deque(maxlen=max_records)
        self._changed = threading.Condition()
        self._num_dropped = 0

    def __len__(self) -> int:
        return len(self._records)

    @property
    def num_dropped(self) -> int:
        """Records that nobody read in time, since start."""
        return self._num_dropped

    def put(self, record: IterationStats) -> None:
        """Add one record. Never waits."""
        self.put_all((record,))

    def put_all(self, records: Iterable[IterationStats]) -> None:
        """Add records, oldest first. Never waits."""
        with self._changed:
            for record in records:
                self._num_dropped += len(self._records) == self._records.maxlen
                self._records.append(record)
            self._changed.notify_all()

    def get_all(self, timeout: float = 0.0) -> list[IterationStats]:
        """Take all records, oldest first; wait up to `timeout` seconds for the first."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._records and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            records = list(self._records)
            self._records.clear()
            return records
