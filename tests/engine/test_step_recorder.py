"""Records of steps and of the requests in them add up to the engine's counters, whatever happens to the requests."""

from __future__ import annotations

import pytest

from tests.support.engine_harness import MAX_UTILIZATION, Harness
from tokenmill.engine.core import EngineCore
from tokenmill.engine.step_recorder import StepRecorder
from tokenmill.telemetry.stats import RequestProgress


def recorded(max_steps: int = 1000, max_request_steps: int = 1000, **shape: object) -> Harness:
    """An engine that keeps records."""
    harness = Harness(**shape)
    recorder = StepRecorder(max_steps, max_request_steps, clock=harness._tick)
    harness.core = EngineCore(harness.scheduler, harness.runner, recorder)
    return harness


def course_of(harness: Harness, request_id: int) -> list[RequestProgress]:
    """All records of one request, oldest first."""
    steps = harness.core.stats().recent_requests
    return [progress for step in steps for progress in step.requests if progress.request_id == request_id]


@pytest.mark.spec("C5")
@pytest.mark.parametrize("overlap", [False, True])
def test_steps_add_up_to_the_counters(overlap: bool) -> None:
    harness = recorded(
        overlap=overlap, num_blocks=14, tokens_per_block=2, max_num_tokens=9, capacity_policy=MAX_UTILIZATION
    )
    for length in (3, 12, 5, 1, 7):
        harness.add(list(range(length)), max_tokens=10)
    for _ in range(6):
        harness.step()
    harness.cancel(1)
    harness.run()
    harness.check_finished()
    stats = harness.core.stats()
    steps = stats.recent_steps
    assert [step.step for step in steps] == list(range(stats.num_steps))
    assert sum(step.num_prompt_tokens for step in steps) == stats.num_prompt_tokens
    assert sum(step.num_generated_tokens for step in steps) == stats.num_generated_tokens
    assert sum(step.num_preemptions for step in steps) == stats.num_preemptions > 0
    assert sum(step.num_finished for step in steps) == 5
    assert sum(step.num_admitted for step in steps) == sum(len(plan.new_slots) for plan in harness.runner.plans)
    for step, plan in zip(steps, harness.runner.plans, strict=True):
        assert step.num_prefills + step.num_decodes == len(plan.rows)
        assert step.duration > 0
    assert [step.end_time for step in steps] == sorted(step.end_time for step in steps)
    assert steps[-1].kv_cache == stats.kv_cache


def test_prefills_are_told_from_decodes() -> None:
    harness = recorded(max_num_tokens=4)
    harness.add(list(range(9)), max_tokens=3)  # chunks of 4, 4 and 1 token
    harness.run()
    steps = harness.core.stats().recent_steps
    assert [(step.num_prefills, step.num_decodes) for step in steps] == [(1, 0), (1, 0), (1, 0), (0, 1), (0, 1)]
    assert [step.num_prompt_tokens for step in steps] == [4, 4, 1, 0, 0]
    assert [step.num_running for step in steps] == [1, 1, 1, 1, 0]


@pytest.mark.spec("C5")
def test_a_request_goes_through_its_stages() -> None:
    harness = recorded(max_num_tokens=4, max_batch_size=1)
    harness.add(list(range(9)), max_tokens=3)
    harness.add([40, 41], max_tokens=1)
    harness.run()
    first = course_of(harness, 0)
    assert [progress.stage for progress in first] == ["prefill", "prefill", "decode", "decode", "finished"]
    assert [progress.num_prefilled_tokens for progress in first] == [4, 8, 9, 9, 9]
    assert [progress.num_generated_tokens for progress in first] == [0, 0, 1, 2, 3]
    assert all(progress.is_scheduled for progress in first)
    second = course_of(harness, 1)
    assert [progress.stage for progress in second] == ["waiting"] * 5 + ["finished"]
    assert [progress.is_scheduled for progress in second] == [False] * 5 + [True]


def test_preempted_and_failed_requests_are_shown() -> None:
    shape: dict[str, object] = {"num_blocks": 13, "tokens_per_block": 2, "capacity_policy": MAX_UTILIZATION}
    harness = recorded(**shape)
    for _ in range(2):
        harness.add([1, 2, 3], max_tokens=16)
    harness.run()
    assert any(progress.is_preempted for progress in course_of(harness, 1))
    assert not any(progress.is_preempted and progress.is_scheduled for progress in course_of(harness, 1))

    failing = recorded()
    failing.runner.launch_error = lambda plan: RuntimeError("lost") if plan.step == 2 else None
    failing.add([1, 2, 3], max_tokens=16)
    failing.run()
    assert [progress.stage for progress in course_of(failing, 0)] == ["decode", "decode", "finished"]
    assert [step.num_finished for step in failing.core.stats().recent_steps] == [0, 0, 1]


@pytest.mark.parametrize("cancel_at_once", [False, True])
def test_a_cancelled_request_is_recorded_once_as_finished(cancel_at_once: bool) -> None:
    harness = recorded()
    harness.add([1, 2, 3], max_tokens=16)
    harness.add([4, 5, 6], max_tokens=4)
    if not cancel_at_once:
        harness.step()
    harness.cancel(0)
    harness.run()
    stages = [progress.stage for progress in course_of(harness, 0)]
    assert stages == ([] if cancel_at_once else ["decode", "finished"]), "what never took part in a step has no record"
    assert not harness.core._recorder._requests


def test_records_are_bounded_and_reading_does_not_drain() -> None:
    harness = recorded(3, 2)
    harness.add([1, 2, 3], max_tokens=16)
    harness.run()
    for _ in range(2):
        stats = harness.core.stats()
        assert [step.step for step in stats.recent_steps] == [13, 14, 15]
        assert [step.step for step in stats.recent_requests] == [14, 15]


def test_an_engine_keeps_no_records_unless_asked() -> None:
    harness = recorded(0, 0)
    harness.add([1, 2, 3], max_tokens=3)
    harness.run()
    stats = harness.core.stats()
    assert stats.num_steps == 3
    assert stats.recent_steps == stats.recent_requests == ()
