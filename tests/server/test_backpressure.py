"""What a refused client is told, at known times and counts."""

from __future__ import annotations

from tokenmill.server.backpressure import MAX_SECONDS, Backpressure


class Situation:
    """A clock and a count that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.finished = 500
        self.backpressure = Backpressure(lambda: self.finished, lambda: self.now)

    def refuse(self, times: int) -> int:
        """The last of several pieces of advice at the same moment."""
        return [self.backpressure.refuse() for _ in range(times)][-1]


def test_first_refused_client_comes_back_soon() -> None:
    assert Situation().refuse(1) == 1


def test_advice_is_the_time_in_which_all_refused_find_a_place() -> None:
    situation = Situation()
    situation.refuse(30)
    situation.now += 4.0
    situation.finished += 20  # in 5 seconds, both ends counted: 4 a second
    assert situation.refuse(10) == 10, "40 refused, at 4 a second"
    situation.finished += 80
    assert situation.refuse(1) == 3, "41 refused, at 20 a second"


def test_old_refusals_are_forgotten() -> None:
    situation = Situation()
    situation.refuse(1000)
    situation.now += 60.0
    situation.finished += 10
    assert situation.refuse(1) == 1


def test_when_nothing_ends_the_advice_grows_with_time() -> None:
    situation = Situation()
    advice = []
    for _ in range(5):
        advice.append(situation.refuse(1))
        situation.now += 2.0
    assert advice == [1, 3, 5, 7, 9]


def test_advice_has_a_limit() -> None:
    situation = Situation()
    situation.refuse(100_000)
    situation.finished += 1
    assert situation.refuse(1) == MAX_SECONDS
