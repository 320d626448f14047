"""Ranks, queue order, admission headroom, victims."""

import pytest

from tokenmill.config import CapacitySchedulerPolicy
from tokenmill.engine import policies
from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.sequence import Sequence, make_request
from tokenmill.sampling_params import SamplingParams

NO_EVICT = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
MAX_UTILIZATION = CapacitySchedulerPolicy.MAX_UTILIZATION
STATIC_BATCH = CapacitySchedulerPolicy.STATIC_BATCH


def sequence(
    arrival: int, priority: float = 0.5, *, policy: policies.QueuePolicy = "priority", index: int = 0
) -> Sequence:
    sampling = SamplingParams(n=index + 1, temperature=1.0)
    inputs = GenerationRequest(arrival, (1, 2), sampling, priority=priority)
    return make_request(inputs, policies.request_rank(policy, inputs, arrival), 100, 0).sequences[index]


def test_fcfs_ignores_priority() -> None:
    late_and_urgent, early = sequence(2, 1.0, policy="fcfs"), sequence(1, 0.0, policy="fcfs")
    assert sorted([late_and_urgent, early], key=policies.queue_key) == [early, late_and_urgent]


def test_priority_goes_before_arrival() -> None:
    low, late, early = sequence(0, 0.1), sequence(2, 0.9), sequence(1, 0.9)
    assert sorted([low, late, early], key=policies.queue_key) == [early, late, low]


def test_started_goes_before_new_at_equal_priority_only() -> None:
    new, sibling, preempted, urgent = sequence(0), sequence(1, index=1), sequence(2), sequence(3, 0.9)
    preempted.num_preemptions = 1
    assert sorted([new, preempted, sibling, urgent], key=policies.queue_key) == [urgent, sibling, preempted, new]


@pytest.mark.parametrize(
    ("policy", "num_running", "expected"),
    [(NO_EVICT, 3, 12), (NO_EVICT, 0, 12), (STATIC_BATCH, 3, 12), (MAX_UTILIZATION, 3, 5), (MAX_UTILIZATION, 0, 0)],
)
def test_headroom(policy: CapacitySchedulerPolicy, num_running: int, expected: int) -> None:
    headroom = policies.admission_headroom(
        policy, num_blocks=500, num_running=num_running, num_promised=10, num_growth=2
    )
    assert headroom == expected


def test_watermark_is_at_least_one_block() -> None:
    assert policies.admission_headroom(MAX_UTILIZATION, num_blocks=9, num_running=1, num_promised=0, num_growth=0) == 1


def test_closed_static_batch_takes_only_siblings() -> None:
    new, sibling = sequence(0), sequence(0, index=1)
    assert policies.may_join(STATIC_BATCH, False, new)
    assert not policies.may_join(STATIC_BATCH, True, new)
    assert policies.may_join(STATIC_BATCH, True, sibling)
    assert policies.may_join(NO_EVICT, True, new)


def test_victim_is_the_worst_ranked_without_a_row() -> None:
    running = [sequence(arrival) for arrival in range(4)]
    for slot, item in enumerate(running):
        item.slot = slot
    assert policies.choose_victim(running, set()) is running[3]
    assert policies.choose_victim(running, {3, 2}) is running[1]


def test_only_what_fits_no_step_is_split_without_chunked_prefill() -> None:
    assert policies.may_chunk(10, 100, True)
    assert not policies.may_chunk(100, 100, False)
    assert policies.may_chunk(101, 100, False)
