"""How long a step may take before its engine counts as stalled."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tokenmill.config import WorkerConfig
from tokenmill.executor.health import STALLED_SECONDS, StepClock
from tokenmill.executor.messages import Heartbeat, Ready
from tokenmill.executor.supervised import SupervisedProcess
from tokenmill.telemetry.stats import EngineStats, IterationStats


def test_short_steps_leave_the_usual_limit() -> None:
    clock = StepClock()
    assert clock.limit == STALLED_SECONDS
    for _ in range(100):
        clock.step_ended(0.05)
    assert clock.limit == STALLED_SECONDS < 2.0


def test_long_steps_raise_it_to_twice_the_longest() -> None:
    clock = StepClock()
    for duration in (0.1, 3.0, 0.1):
        clock.step_ended(duration)
    assert clock.limit == pytest.approx(6.0, rel=0.01)


def test_one_long_step_is_forgotten() -> None:
    clock = StepClock()
    clock.step_ended(60.0)
    for _ in range(6000):
        clock.step_ended(0.1)
    assert clock.limit == STALLED_SECONDS


class _Child:
    """A process that lives."""

    exit_code = None
    pid = 1


def supervised(now: float = 0.0) -> SupervisedProcess:
    """A worker that has just become ready."""
    anything: Any = None
    process = SupervisedProcess("worker", 0, WorkerConfig(), anything, anything, anything)
    process.child = cast(Any, _Child())
    process.on_message(Ready(None), now)
    return process


def heartbeat(*durations: float, has_work: bool = True) -> Heartbeat:
    steps = [
        IterationStats(0, step, 0.0, duration, 1, 0, 0, 1, 0, 1) for step, duration in enumerate(durations, start=1)
    ]
    return Heartbeat(has_work, EngineStats(), steps)


def state_after(process: SupervisedProcess, seconds: float, message: Heartbeat) -> str:
    """The state at the end of some time of heartbeats without a step."""
    now = 0.0
    while now < seconds:
        now += 0.25
        process.on_message(message, now)
    process.check(now)
    return process.state


def test_a_worker_that_is_heard_but_finishes_no_step_is_stalled() -> None:
    assert state_after(supervised(), 1.25, heartbeat()) == "ready"
    assert state_after(supervised(), 1.75, heartbeat()) == "stalled"
    assert state_after(supervised(), 60.0, heartbeat(has_work=False)) == "ready", "there is nothing to do"


def test_a_worker_with_long_steps_gets_more_time() -> None:
    process = supervised()
    process.on_message(heartbeat(4.0), 0.0)
    assert state_after(process, 7.0, heartbeat()) == "ready"
    assert state_after(process, 9.0, heartbeat()) == "stalled"
    process.progressed(9.0)
    process.check(9.25)
    assert process.state == "ready"
    health = process.health(9.5, None, None)
    assert health.progress_age == pytest.approx(0.5)


def test_a_worker_that_is_not_heard_is_silent_within_two_seconds() -> None:
    process = supervised()
    process.on_message(heartbeat(), 0.0)
    process.check(1.5)
    assert process.state != "silent"
    process.check(1.8)
    assert process.state == "silent"
