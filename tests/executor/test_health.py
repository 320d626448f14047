"""How long a step may take before its engine counts as stalled."""

from __future__ import annotations

import pytest

from tokenmill.executor.health import STALLED_SECONDS, StepClock


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
