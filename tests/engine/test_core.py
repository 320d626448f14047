"""The step loop: failures of the runner end only the requests of their plan; overlap changes nothing in the answers."""

import pytest

from tests.support.engine_harness import MAX_UTILIZATION, Harness
from tests.support.mock_runner import MockRunner
from tokenmill.config import CapacitySchedulerPolicy
from tokenmill.engine.core import EngineCore
from tokenmill.engine.events import Failed, TokenDelta
from tokenmill.engine.plan import BatchPlan, Interruption, Row
from tokenmill.errors import DeviceFaultError, EngineError, InvalidLogitsError, OutOfMemoryError, TokenmillError

overlap_on_and_off = pytest.mark.parametrize("overlap", [False, True])


def fill(harness: Harness, num_requests: int = 4, max_tokens: int = 8) -> None:
    for first in range(num_requests):
        harness.add([first, *range(10)], max_tokens=max_tokens)


def error_of(harness: Harness, request_id: int) -> TokenmillError:
    ending = harness.endings[request_id]
    assert isinstance(ending, Failed)
    return ending.error


@pytest.mark.spec("H3")
def test_overlap_gives_the_same_tokens() -> None:
    tokens = []
    for overlap in (False, True):
        harness = Harness(num_blocks=20, overlap=overlap, capacity_policy=MAX_UTILIZATION)
        fill(harness, 8)
        harness.run()
        harness.check_finished()
        tokens.append([harness.tokens(request_id) for request_id in range(8)])
    assert tokens[0] == tokens[1]


def test_overlap_launches_before_it_collects() -> None:
    harness = Harness(overlap=True)
    fill(harness, 1)
    assert harness.step() == [], "the first step is only launched"
    assert len(harness.runner.plans) == 1
    events = harness.step()
    assert len(harness.runner.plans) == 2
    assert [type(event) for event in events] == [TokenDelta]


@pytest.mark.parametrize("where", ["launch_error", "collect_error"])
@overlap_on_and_off
def test_runner_exception_ends_the_requests_of_its_plan(where: str, overlap: bool) -> None:
    harness = Harness(overlap=overlap, max_batch_size=2)
    fill(harness)
    cause = RuntimeError("device lost")
    setattr(harness.runner, where, lambda plan: cause if plan.step == 2 else None)
    harness.run()
    for request_id in (0, 1):
        error = error_of(harness, request_id)
        assert type(error) is EngineError and error.__cause__ is cause
        assert "RuntimeError: device lost" in str(error)
    harness.check_finished(failed={0, 1})
    assert harness.core.stats().num_finished == {"engine_error": 2, "length": 2}


@overlap_on_and_off
def test_our_own_errors_pass_through(overlap: bool) -> None:
    harness = Harness(overlap=overlap, max_batch_size=2)
    fill(harness)
    error = InvalidLogitsError("no step gives any")
    harness.runner.launch_error = lambda plan: error if plan.step == 0 else None
    harness.run()
    assert error_of(harness, 0) is error_of(harness, 1) is error
    harness.check_finished(failed={0, 1})
    assert harness.core.stats().num_finished == {"invalid_logits": 2, "length": 2}


NO_MEMORY = OutOfMemoryError("no memory for the step")


@pytest.mark.spec("F4")
@pytest.mark.parametrize("policy", list(CapacitySchedulerPolicy))
@overlap_on_and_off
def test_steps_without_memory_are_tried_again_and_change_no_token(
    overlap: bool, policy: CapacitySchedulerPolicy
) -> None:
    for step in range(12):
        harness = Harness(overlap=overlap, max_batch_size=3, max_num_tokens=16, num_blocks=24, capacity_policy=policy)
        fill(harness)
        harness.add(range(9), max_tokens=5, n=2)
        harness.runner.launch_error = lambda plan, step=step: NO_MEMORY if plan.step == step else None  # type: ignore[misc]
        harness.run()
        harness.check_finished()
        assert harness.core.stats().num_preemptions >= 1, step


@pytest.mark.spec("F4")
@overlap_on_and_off
def test_a_request_that_never_fits_ends_and_the_others_go_on(overlap: bool) -> None:
    harness = Harness(overlap=overlap, enable_chunked_prefill=False)
    fill(harness, 3)
    harness.add(range(40), max_tokens=4)
    fill(harness, 2)
    harness.runner.launch_error = lambda plan: NO_MEMORY if max(row.num_tokens for row in plan.rows) >= 30 else None
    harness.run()
    assert error_of(harness, 3) is NO_MEMORY
    harness.check_finished(failed={3})
    assert harness.core.stats().num_finished == {"out_of_memory": 1, "length": 5}


@pytest.mark.spec("F4")
@overlap_on_and_off
def test_without_any_memory_every_request_ends(overlap: bool) -> None:
    harness = Harness(overlap=overlap)
    fill(harness)
    harness.runner.launch_error = lambda plan: NO_MEMORY
    harness.run()
    harness.check_finished(failed={0, 1, 2, 3})
    harness.runner.launch_error = lambda plan: None
    fill(harness, 1)
    harness.run()
    assert len(harness.tokens(4)) == 8


@pytest.mark.spec("F4")
@overlap_on_and_off
def test_a_fault_of_the_device_comes_out_at_once(overlap: bool) -> None:
    harness = Harness(overlap=overlap)
    fill(harness)
    fault = DeviceFaultError("illegal access")
    harness.runner.launch_error = lambda plan: fault if plan.step == 2 else None
    with pytest.raises(DeviceFaultError) as caught:
        harness.run()
    assert caught.value is fault
    assert not harness.endings


@pytest.mark.parametrize("fails", [False, True])
@overlap_on_and_off
def test_a_released_engine_has_no_step_under_way_and_no_runner(overlap: bool, fails: bool) -> None:
    harness = Harness(overlap=overlap)
    harness.runner.collect_error = lambda plan: ValueError("lost") if fails and plan.step == 1 else None
    fill(harness, 2)
    for _ in range(2):
        harness.step()
    stats = harness.core.stats()
    harness.core.release()
    assert not harness.runner._uncollected, "the device may still write to what is freed"
    assert not hasattr(harness.core, "runner")
    assert harness.core.stats() == stats
    harness.core.check_integrity()


@overlap_on_and_off
def test_every_step_may_fail_and_the_engine_goes_on(overlap: bool) -> None:
    harness = Harness(overlap=overlap)
    harness.runner.collect_error = lambda plan: ValueError(f"step {plan.step}") if plan.step < 5 else None
    for _ in range(6):
        fill(harness, 2)
        harness.run()
    assert sum(isinstance(ending, Failed) for ending in harness.endings.values()) >= 4
    fill(harness, 1)
    harness.run()
    assert len(harness.tokens(12)) == 8
    failed = {request_id for request_id, ending in harness.endings.items() if isinstance(ending, Failed)}
    harness.check_finished(failed=failed)


@overlap_on_and_off
def test_bad_logits_end_one_request(overlap: bool) -> None:
    harness = Harness(overlap=overlap)
    fill(harness)
    harness.runner.row_error = lambda plan, row: "logits are NaN" if plan.step == 3 and row.slot == 1 else None
    harness.run()
    assert type(error_of(harness, 1)) is InvalidLogitsError and "NaN" in str(error_of(harness, 1))
    harness.check_finished(failed={1})


def test_bad_logits_of_one_sequence_end_its_siblings() -> None:
    harness = Harness()
    harness.add(range(5), max_tokens=6, n=3)
    fill(harness, 1)

    def row_error(plan: BatchPlan, row: Row) -> str | None:
        init = harness.runner.slots[row.slot].init
        return "inf" if init.seed == 0 and init.sequence_index == 2 and row.start > 5 else None

    harness.runner.row_error = row_error
    harness.run()
    assert [len(answer.token_ids) for answer in harness.answers[0]] == [4, 3, 2]
    harness.check_finished(failed={0})


def test_content_of_a_failed_request_is_not_reused() -> None:
    harness = Harness(max_num_tokens=8)
    harness.add(range(20), max_tokens=2)
    harness.step()
    harness.step()
    assert harness.core.stats().kv_cache.num_cached_blocks == 4
    harness.runner.row_error = lambda plan, row: "NaN" if plan.step == 2 else None
    harness.step()
    assert harness.core.stats().kv_cache.num_cached_blocks == 0
    harness.add(range(20), max_tokens=2)
    harness.run()
    assert harness.endings[1].metrics.num_cached_tokens == 0
    harness.check_finished(failed={0})


def test_mixing_the_two_kinds_of_steps_is_refused() -> None:
    harness = Harness(overlap=True)
    fill(harness, 1)
    harness.step()
    with pytest.raises(AssertionError, match="in flight"):
        harness.core.step()
    harness.run()
    harness.core.step()
    harness.check_finished()


def test_two_engines_do_not_know_of_each_other() -> None:
    one, two = Harness(), Harness(overlap=True)
    fill(one, 3)
    fill(two, 2)
    while one.core.has_work or two.core.has_work:
        one.step()
        two.step()
    one.check_finished()
    two.check_finished()
    assert one.tokens(0) == two.tokens(0)


def test_repeated_steps_give_the_same_tokens() -> None:
    """The host looks at tokens once for several steps: the answers, and what is cached, are the same."""
    answers = []
    for max_repeats in (1, 6):
        harness = Harness(num_blocks=20, max_repeats=max_repeats, capacity_policy=MAX_UTILIZATION)
        fill(harness)
        harness.run()
        harness.check_finished()
        answers.append([harness.tokens(request_id) for request_id in harness.requests])
        plans = harness.runner.plans
    assert answers[0] == answers[1]
    assert max(plan.max_repeats for plan in plans) > 3


def test_steps_are_repeated_only_while_sequences_decode_and_nobody_waits() -> None:
    harness = Harness(max_batch_size=2, max_repeats=6, max_num_tokens=8)
    harness.add(range(5), max_tokens=40)
    harness.step()
    assert harness.runner.plans[-1].max_repeats == 1, "a prompt"
    harness.step()
    assert harness.runner.plans[-1].max_repeats == 6
    harness.add(range(30), max_tokens=9)
    for _ in range(4):
        harness.step()
        assert harness.runner.plans[-1].max_repeats == 1, "chunks of a prompt"
    harness.add(range(3), max_tokens=9)
    harness.step()
    assert harness.runner.plans[-1].max_repeats == 1, "a request waits for a slot"
    harness.run()
    harness.check_finished()


@pytest.mark.parametrize(
    ("inputs", "is_watched"),
    [
        ({}, False),
        ({"streaming": True}, True),
        ({"stop_words": ((3, 4),)}, True),
        ({"stop": "the end"}, True),
    ],
)
def test_steps_are_repeated_longer_where_nobody_waits_for_tokens(inputs: dict[str, object], is_watched: bool) -> None:
    """One request that is watched is enough."""
    harness = Harness(max_repeats=60, max_seq_len=200, num_blocks=200)
    harness.add(range(5), max_tokens=80)
    harness.add(range(9), max_tokens=80, **inputs)
    harness.step()
    harness.step()
    plan = harness.runner.plans[-1]
    assert (plan.is_watched, plan.max_repeats) == (is_watched, 16 if is_watched else 60)
    harness.run()
    harness.check_finished()


def test_what_comes_after_the_end_of_a_repeated_step_is_nobodys() -> None:
    probe = Harness()
    probe.add(range(5), max_tokens=12)
    probe.run()
    answer = probe.tokens(0)
    index = next(index for index in range(4, 12) if answer[index] not in answer[:index])
    harness = Harness(max_repeats=8)
    harness.add(range(5), max_tokens=12, end_ids=(answer[index],))
    harness.run()
    assert harness.tokens(0) == answer[:index]
    harness.check_finished()


class InterruptedRunner(MockRunner):
    """Repeats until it is asked for something."""

    max_repeats = 4

    def interrupt_when(self, interruption: Interruption) -> None:
        self.interruption = interruption


def test_a_runner_that_repeats_hears_of_those_who_wait() -> None:
    harness = Harness(max_repeats=4)
    runner = InterruptedRunner(64, 4, 8, gives_logprobs=False)
    core = EngineCore(harness.scheduler, runner)
    assert runner.interruption is core.interruption
    assert not harness.core.interruption.is_set  # no concern of other runners
