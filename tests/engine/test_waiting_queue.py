"""Order and removal."""

import random

import pytest

from tests.engine.test_policies import sequence
from tokenmill.engine import policies
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.waiting_queue import WaitingQueue


def test_behaves_like_a_sorted_list() -> None:
    rng = random.Random(1)
    queue, reference = WaitingQueue(), list[Sequence]()
    for arrival in range(300):
        if reference and rng.random() < 0.4:
            gone = rng.choice(reference)
            reference.remove(gone)
            queue.remove(gone)
        else:
            item = sequence(arrival, rng.choice([0.1, 0.5]))
            reference.append(item)
            queue.push(item)
        reference.sort(key=policies.queue_key)
        assert list(queue) == reference and len(queue) == len(reference)
        if reference:
            assert queue.head is reference[0]


def test_removing_what_is_not_there_is_refused() -> None:
    queue = WaitingQueue()
    queue.push(sequence(1))
    with pytest.raises(AssertionError, match="not in the waiting queue"):
        queue.remove(sequence(0))
