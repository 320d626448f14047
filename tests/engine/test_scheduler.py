"""What a plan holds and when: budgets, order, admission policies, preemption, siblings, endings."""

import pytest

from tests.support.engine_harness import MAX_UTILIZATION, NO_EVICT, STATIC_BATCH, Harness
from tests.support.mock_runner import Pending, expected_answer
from tokenmill.engine.events import Finished, TokenDelta
from tokenmill.engine.plan import BatchPlan

overlap_on_and_off = pytest.mark.parametrize("overlap", [False, True])


def last_plan(harness: Harness) -> BatchPlan:
    return harness.runner.plans[-1]


def spans(plan: BatchPlan) -> list[tuple[int, int]]:
    return [(row.start, row.num_tokens) for row in plan.rows]


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + 7 * i) % 50 for i in range(length)]


# Budgets and order


def test_long_prompt_is_computed_in_chunks_and_sampled_once() -> None:
    harness = Harness(max_num_tokens=8)
    harness.add(prompt(20), max_tokens=2)
    for expected in ([(0, 8)], [(8, 8)], [(16, 4)], [(20, 1)]):
        harness.step()
        assert spans(last_plan(harness)) == expected
    assert [row.sample for plan in harness.runner.plans for row in plan.rows] == [False, False, True, True]
    harness.check_finished()


def test_decodes_come_first_then_running_prefills_then_admissions() -> None:
    harness = Harness(max_num_tokens=8, block_reuse=False)
    harness.add(prompt(3), max_tokens=9)
    harness.step()
    harness.add(prompt(10, 1))
    harness.step()
    assert spans(last_plan(harness)) == [(3, 1), (0, 7)]
    harness.add(prompt(9, 2))
    harness.step()
    assert spans(last_plan(harness)) == [(4, 1), (7, 3), (0, 4)]
    harness.run()
    harness.check_finished()


def test_prefill_chunk_of_one_token_stands_with_the_decodes() -> None:
    harness = Harness(max_num_tokens=4, block_reuse=False)
    harness.add(prompt(5), max_tokens=4)
    harness.step()
    harness.add(prompt(3, 1), max_tokens=4)
    harness.add(prompt(3, 2), max_tokens=4)
    harness.step()
    assert spans(last_plan(harness)) == [(4, 1), (0, 3)]
    harness.run()
    harness.check_finished()


def test_long_prompt_is_not_starved_by_short_ones() -> None:
    harness = Harness(max_num_tokens=4, max_batch_size=4, max_seq_len=64)
    harness.add(prompt(40), max_tokens=1)
    for arrival in range(40):
        harness.add([arrival], max_tokens=5)
    steps = 0
    while 0 not in harness.endings:
        harness.step()
        steps += 1
    assert steps <= 40, "every step computes at least a token of it"
    harness.run()
    harness.check_finished()


def test_whole_prompts_without_chunked_prefill() -> None:
    harness = Harness(max_num_tokens=10, enable_chunked_prefill=False, block_reuse=False)
    for first in range(3):
        harness.add(prompt(6, first), max_tokens=3)
    harness.step()
    assert spans(last_plan(harness)) == [(0, 6)]
    harness.step()
    assert spans(last_plan(harness)) == [(6, 1), (0, 6)]
    harness.run()
    harness.check_finished()


def test_long_answer_resumes_in_chunks_even_without_chunked_prefill() -> None:
    harness = Harness(
        num_blocks=9, max_num_tokens=8, enable_chunked_prefill=False, capacity_policy=MAX_UTILIZATION, block_reuse=False
    )
    for first in range(2):
        harness.add(prompt(7, first), max_tokens=20)
    harness.run()
    assert harness.core.stats().num_preemptions > 0
    assert max(slot.init.token_ids.__len__() for slot in harness.runner.slots.values()) > 8
    harness.check_finished()


def test_no_more_sequences_than_slots_or_tokens() -> None:
    harness = Harness(max_batch_size=3)
    for first in range(7):
        harness.add(prompt(2, first), max_tokens=3)
    harness.step()
    assert harness.core.stats().num_running == 3 and harness.core.stats().num_waiting == 4
    harness.run()
    harness.check_finished()
    harness = Harness(max_batch_size=8, max_num_tokens=2)
    for first in range(7):
        harness.add(prompt(1, first), max_tokens=3)
    harness.run()
    assert max(len(plan.rows) for plan in harness.runner.plans) == 2
    harness.check_finished()


def test_nothing_to_do_gives_an_empty_plan() -> None:
    harness = Harness()
    plan = harness.scheduler.schedule()
    assert plan.rows == () and plan.num_tokens == 0 and not harness.scheduler.has_work


def test_priority_queue_lets_the_urgent_go_first() -> None:
    harness = Harness(max_batch_size=1, queue_policy="priority")
    low = harness.add(prompt(2), max_tokens=1, priority=0.1)
    high = harness.add(prompt(2, 1), max_tokens=1, priority=0.9)
    middle = harness.add(prompt(2, 2), max_tokens=1)
    harness.run()
    assert list(harness.endings) == [high, middle, low]
    harness.check_finished()


# Prefix reuse


@pytest.mark.spec("C2")
def test_second_request_computes_only_what_is_new() -> None:
    harness = Harness()
    harness.add(prompt(11), max_tokens=1)
    harness.run()
    harness.add([*prompt(11), 1, 2], max_tokens=1)
    harness.run()
    assert spans(last_plan(harness)) == [(11, 2)]
    assert len(last_plan(harness).block_copies) == 1
    assert harness.endings[1].metrics.num_cached_tokens == 11
    harness.check_finished()


def test_prompt_logprobs_need_every_position() -> None:
    harness = Harness(max_num_tokens=6)
    harness.add(prompt(11), max_tokens=2)
    harness.run()
    harness.add(prompt(11), max_tokens=3, prompt_logprobs=0)
    harness.run()
    assert harness.endings[1].metrics.num_cached_tokens == 0
    assert len(harness.answers[1][0].prompt_logprobs) == 10
    harness.check_finished()


@overlap_on_and_off
def test_prompt_logprobs_are_delivered_once_across_a_preemption(overlap: bool) -> None:
    harness = Harness(
        num_blocks=14, tokens_per_block=2, max_num_tokens=4, capacity_policy=MAX_UTILIZATION, overlap=overlap
    )
    harness.add(prompt(2), max_tokens=20)
    for _ in range(2):
        harness.step()
    harness.add(prompt(16, 1), max_tokens=4, prompt_logprobs=0)
    harness.run()
    slots = [init for plan in harness.runner.plans for init in plan.new_slots]
    assert len(slots) > 2 and harness.endings[1].metrics.num_preemptions > 0
    harness.check_finished()


# Capacity policies


@pytest.mark.spec("C4")
def test_guaranteed_no_evict_admits_only_what_can_run_to_its_end() -> None:
    harness = Harness(num_blocks=11, capacity_policy=NO_EVICT)
    for first in range(3):
        harness.add(prompt(4, first), max_tokens=17)  # 5 blocks at worst
    harness.step()
    assert harness.core.stats().num_running == 2
    harness.run()
    assert harness.core.stats().num_preemptions == 0
    harness.check_finished()


def test_guaranteed_no_evict_counts_shared_blocks_once() -> None:
    harness = Harness(num_blocks=12, capacity_policy=NO_EVICT)
    shared = prompt(24)
    harness.add(shared, max_tokens=1)
    harness.run()
    for last in range(3):
        harness.add([*shared, last], max_tokens=4)  # 7 blocks each, 6 of them shared
    harness.step()
    assert harness.core.stats().num_running == 3
    harness.run()
    assert harness.core.stats().num_preemptions == 0
    harness.check_finished()


def test_max_utilization_admits_more_and_preempts_the_latest() -> None:
    harness = Harness(num_blocks=11, capacity_policy=MAX_UTILIZATION)
    for first in range(3):
        harness.add(prompt(4, first), max_tokens=17)
    harness.step()
    assert harness.core.stats().num_running == 3
    harness.run()
    assert list(harness.endings) == [0, 1, 2]
    assert harness.endings[0].metrics.num_preemptions == 0
    assert harness.endings[2].metrics.num_preemptions > 0
    assert harness.core.stats().num_preemptions == sum(e.metrics.num_preemptions for e in harness.endings.values())
    harness.check_finished()


def test_preemption_takes_the_lowest_priority() -> None:
    harness = Harness(num_blocks=11, capacity_policy=MAX_UTILIZATION, queue_policy="priority")
    for first, priority in enumerate([0.1, 0.9, 0.5]):
        harness.add(prompt(4, first), max_tokens=17, priority=priority)
    harness.run()
    assert list(harness.endings) == [1, 2, 0]
    assert harness.endings[1].metrics.num_preemptions == 0 < harness.endings[0].metrics.num_preemptions
    harness.check_finished()


@pytest.mark.spec("H3")
@overlap_on_and_off
@pytest.mark.parametrize("block_reuse", [True, False])
def test_preempted_gives_the_same_tokens_as_uninterrupted(overlap: bool, block_reuse: bool) -> None:
    tokens = []
    for num_blocks in (64, 11):
        harness = Harness(
            num_blocks=num_blocks, capacity_policy=MAX_UTILIZATION, overlap=overlap, block_reuse=block_reuse
        )
        for first in range(4):
            harness.add(prompt(4 + first, first), max_tokens=17)
        harness.run()
        harness.check_finished()
        assert (harness.core.stats().num_preemptions > 0) == (num_blocks == 11)
        tokens.append([harness.tokens(request_id) for request_id in range(4)])
    assert tokens[0] == tokens[1]


def test_resumed_sequence_finds_its_blocks_in_the_cache() -> None:
    harness = Harness(num_blocks=12, capacity_policy=MAX_UTILIZATION, max_num_tokens=16)
    for first in range(2):
        harness.add(prompt(8, first), max_tokens=18)
    harness.run()
    stats = harness.core.stats()
    assert stats.num_preemptions > 0 and stats.kv_cache.num_hit_tokens > 0
    harness.check_finished()


@overlap_on_and_off
def test_static_batch_runs_to_its_end_before_the_next(overlap: bool) -> None:
    harness = Harness(capacity_policy=STATIC_BATCH, max_batch_size=3, overlap=overlap)
    for first in range(5):
        harness.add(prompt(3, first), max_tokens=2 + 3 * (first % 3))
    while len(harness.endings) < 3:
        harness.step()
        started = {init.seed for plan in harness.runner.plans for init in plan.new_slots}
        assert started == {0, 1, 2}
    harness.run()
    assert sorted(list(harness.endings)[:3]) == [0, 1, 2]
    harness.check_finished()


def test_static_batch_fills_over_several_steps_when_tokens_are_short() -> None:
    harness = Harness(capacity_policy=STATIC_BATCH, max_num_tokens=8, max_batch_size=4, block_reuse=False)
    for first in range(6):
        harness.add(prompt(6, first), max_tokens=12)
    while len(harness.endings) < 1:
        harness.step()
    assert {init.seed for plan in harness.runner.plans for init in plan.new_slots} == {0, 1, 2, 3}
    harness.run()
    harness.check_finished()


# Overlap


@pytest.mark.parametrize("num_under_way", [1, 2, 4])
@pytest.mark.parametrize("num_blocks", [9, 12, 64])
def test_plans_may_run_ahead_of_commits(num_under_way: int, num_blocks: int) -> None:
    """Several plans are under way at any time; nothing is planned past the end, and the answers are the same."""
    harness = Harness(num_blocks=num_blocks, max_num_tokens=8, capacity_policy=MAX_UTILIZATION, max_batch_size=4)
    for first in range(8):
        harness.add(prompt(6 + first % 3, first), max_tokens=4 + 3 * (first % 4), end_ids=(11,))
    under_way: list[tuple[BatchPlan, Pending]] = []
    answers: dict[int, list[int]] = {request_id: [] for request_id in range(8)}
    num_finished = 0
    while harness.scheduler.has_work:
        plan = harness.scheduler.schedule()
        if plan.rows:
            under_way.append((plan, harness.runner.launch(plan)))
        if len(under_way) == num_under_way or not plan.rows:
            oldest, pending = under_way.pop(0)
            for event in harness.scheduler.commit(oldest, harness.runner.collect(pending)):
                if isinstance(event, TokenDelta):
                    answers[event.request_id] += event.token_ids
                num_finished += isinstance(event, Finished)
        harness.scheduler.check_integrity()
    assert num_finished == 8
    assert (harness.core.stats().num_preemptions > 0) == (num_blocks < 64)
    for request_id, inputs in harness.requests.items():
        assert tuple(answers[request_id]) == expected_answer(inputs, 0, max_seq_len=64).token_ids


def test_commits_out_of_order_are_refused() -> None:
    harness = Harness()
    harness.add(prompt(3))
    plans = [harness.scheduler.schedule() for _ in range(2)]
    outputs = [harness.runner.run(plan) for plan in plans]
    with pytest.raises(AssertionError, match="before an earlier one"):
        harness.scheduler.commit(plans[1], outputs[1])


# Numbers


def test_statistics() -> None:
    harness = Harness(max_batch_size=1)
    harness.add(prompt(5), max_tokens=3)
    harness.add(prompt(6, 1), max_tokens=3)
    harness.step()
    stats = harness.core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (1, 1, 1)
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (5, 1)
    assert stats.last_step_time is not None and stats.kv_cache.usage == pytest.approx(2 / 63)
    harness.run()
    stats = harness.core.stats()
    assert (stats.num_prompt_tokens, stats.num_generated_tokens, stats.num_steps) == (11, 6, 6)
    assert stats.num_finished == {"length": 2}
    metrics = harness.endings[1].metrics
    assert metrics.first_scheduled_time is not None and metrics.first_token_time is not None
    assert metrics.first_scheduled_time < metrics.first_token_time <= metrics.finished_time
    harness.check_finished()
