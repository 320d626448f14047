"""Several sequences of one request, over the mock runner: they share the prompt and end on their own."""

import pytest

from tests.support.engine_harness import MAX_UTILIZATION, NO_EVICT, STATIC_BATCH, Harness
from tokenmill.config import CapacitySchedulerPolicy

overlap_on_and_off = pytest.mark.parametrize("overlap", [False, True])


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + 7 * i) % 50 for i in range(length)]


@overlap_on_and_off
@pytest.mark.parametrize("block_reuse", [True, False])
@pytest.mark.parametrize("length", [1, 4, 9])
def test_siblings_compute_only_the_last_prompt_token(overlap: bool, block_reuse: bool, length: int) -> None:
    harness = Harness(overlap=overlap, block_reuse=block_reuse)
    harness.add(prompt(length), max_tokens=5, n=3)
    harness.run()
    first_rows = {}
    for plan in harness.runner.plans:
        index_of = {init.slot: init.sequence_index for init in plan.new_slots}
        first_rows.update(
            {index_of[row.slot]: (row.start, row.num_tokens) for row in plan.rows if row.slot in index_of}
        )
    assert first_rows == {0: (0, length), 1: (length - 1, 1), 2: (length - 1, 1)}
    assert len({tuple(harness.tokens(0, index)) for index in range(3)}) == 3
    harness.check_finished()


@overlap_on_and_off
def test_siblings_run_after_the_first_has_ended(overlap: bool) -> None:
    harness = Harness(max_batch_size=3, overlap=overlap)
    harness.add(prompt(3, 5), max_tokens=12)
    harness.add(prompt(3, 6), max_tokens=12)
    harness.add(prompt(9), max_tokens=1, n=3)
    harness.run()
    starts = [init.sequence_index for plan in harness.runner.plans for init in plan.new_slots if init.seed == 2]
    assert starts == [0, 1, 2]
    assert harness.core.stats().num_prompt_tokens == 3 + 3 + 9 + 2
    harness.check_finished()


def test_held_prompt_is_given_up_before_anyone_is_preempted() -> None:
    """Two sequences grow to 4 blocks each, which is all there is, while a sibling holds 2 blocks of its prompt."""
    harness = Harness(
        num_blocks=9, capacity_policy=MAX_UTILIZATION, queue_policy="priority", max_batch_size=2, block_reuse=False
    )
    harness.add(prompt(3, 5), max_tokens=13)
    harness.add(prompt(9), max_tokens=1, n=2)
    harness.step()
    harness.add(prompt(3, 6), max_tokens=13, priority=0.9)
    harness.step()
    assert harness.core.stats().num_waiting == 1 and len(harness.kv.sequence_ids()) == 3
    harness.run()
    stats = harness.core.stats()
    assert (stats.num_preemptions, stats.num_prompt_tokens) == (0, 3 + 9 + 3 + 9)
    harness.check_finished()


@overlap_on_and_off
def test_held_prompt_is_given_up_when_its_holder_needs_the_room(overlap: bool) -> None:
    """The prompt fills 3 of 5 blocks, the last one in part; a sibling needs 3 more to be sure of its end."""
    harness = Harness(num_blocks=6, capacity_policy=NO_EVICT, overlap=overlap)
    harness.add(prompt(10), max_tokens=11, n=3)
    harness.run()
    assert harness.core.stats().num_prompt_tokens > 10 + 2
    harness.check_finished()


@pytest.mark.parametrize("capacity_policy", [NO_EVICT, MAX_UTILIZATION, STATIC_BATCH])
def test_more_siblings_than_the_cache_holds_at_once(capacity_policy: CapacitySchedulerPolicy) -> None:
    harness = Harness(num_blocks=6, capacity_policy=capacity_policy)
    harness.add(prompt(9), max_tokens=12, n=6)
    harness.add(prompt(9, 1), max_tokens=12, n=6)
    harness.run()
    harness.check_finished()


def test_first_sequence_ended_before_the_prompt_was_computed() -> None:
    harness = Harness(max_num_tokens=4)
    harness.add(prompt(12), max_tokens=3, n=3)
    harness.step()
    assert harness.finish_sequence(0, 0)
    harness.run()
    harness.check_finished()


def test_best_of_gives_all_sequences() -> None:
    harness = Harness()
    harness.add(prompt(5), max_tokens=3, n=1, best_of=4)
    harness.run()
    assert all(len(harness.tokens(0, index)) == 3 for index in range(4))
    harness.check_finished()
