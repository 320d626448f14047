"""`WaitingQueue`: sequences that wait for a slot and blocks, in the order of `policies.queue_key`."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from tokenmill.engine.policies import QueueKey, queue_key
from tokenmill.engine.sequence import Sequence


class WaitingQueue:
    """A sorted list: the head is read in O(1), any sequence is inserted or removed in O(log n) comparisons.

    A sequence's key does not change while it waits.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[QueueKey, Sequence]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for _, sequence in self._entries)

    @property
    def head(self) -> Sequence:
        """The next to be admitted; there must be one."""
        return self._entries[0][1]

    def push(self, sequence: Sequence) -> None:
        """Add a sequence at its place."""
        insort(self._entries, (queue_key(sequence), sequence), key=_key)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that is in the queue."""
        index = bisect_left(self._entries, queue_key(sequence), key=_key)
        assert self._entries[index][1] is sequence, f"sequence {sequence.id} is not in the waiting queue"
        del self._entries[index]


def _key(entry: tuple[QueueKey, Sequence]) -> QueueKey:
    return entry[0]
