"""How sequences and requests end, over the mock runner: tokens, lengths, cancellations, from outside."""

import pytest

from tests.support.engine_harness import MAX_UTILIZATION, Harness
from tokenmill.engine.events import Finished, TokenDelta
from tokenmill.engine.plan import BatchPlan

overlap_on_and_off = pytest.mark.parametrize("overlap", [False, True])


def last_plan(harness: Harness) -> BatchPlan:
    return harness.runner.plans[-1]


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + 7 * i) % 50 for i in range(length)]


def end_token_at(harness: Harness, request_tokens: list[int], position: int) -> int:
    """The token that request 0 generates at a position of its answer, not seen before in it."""
    probe = Harness(max_seq_len=harness.settings.max_seq_len)
    probe.add(request_tokens, max_tokens=position + 1)
    probe.run()
    token_id = probe.tokens(0)[position]
    assert token_id not in probe.tokens(0)[:position]
    return token_id


@overlap_on_and_off
def test_end_token_ends_and_is_not_part_of_the_answer(overlap: bool) -> None:
    harness = Harness(overlap=overlap)
    token_id = end_token_at(harness, prompt(5), 3)
    harness.add(prompt(5), max_tokens=20, end_ids=(token_id,))
    harness.run()
    answer = harness.answers[0][0]
    assert len(answer.token_ids) == 3 and (answer.finish_reason, answer.stop_reason) == ("stop", None)
    harness.check_finished()


@pytest.mark.parametrize("is_included", [False, True])
def test_stop_token_is_named_and_kept_if_asked(is_included: bool) -> None:
    harness = Harness()
    token_id = end_token_at(harness, prompt(5), 3)
    harness.add(prompt(5), 20, stop_token_ids=(token_id,), end_ids=(token_id,), include_stop_str_in_output=is_included)
    harness.run()
    answer = harness.answers[0][0]
    assert len(answer.token_ids) == 3 + is_included
    assert (answer.finish_reason, answer.stop_reason) == ("stop", token_id)
    harness.check_finished()


def test_end_tokens_do_not_end_before_min_tokens() -> None:
    harness = Harness()
    token_id = end_token_at(harness, prompt(5), 3)
    harness.add(prompt(5), max_tokens=20, end_ids=(token_id,), min_tokens=10)
    harness.run()
    assert len(harness.tokens(0)) >= 10
    assert last_plan(harness) and harness.runner.plans[0].new_slots[0].end_ids == (token_id,)
    harness.check_finished()


def test_length_is_clipped_to_the_context() -> None:
    harness = Harness(max_seq_len=12)
    harness.add(prompt(9), max_tokens=500)
    harness.add(prompt(11), max_tokens=1)
    harness.run()
    assert [len(harness.tokens(i)) for i in range(2)] == [3, 1]
    assert {harness.answers[i][0].finish_reason for i in range(2)} == {"length"}
    harness.check_finished()


def test_stop_on_the_last_possible_token_is_a_stop() -> None:
    harness = Harness()
    token_id = end_token_at(harness, prompt(5), 3)
    harness.add(prompt(5), max_tokens=4, end_ids=(token_id,))
    harness.run()
    assert harness.answers[0][0].finish_reason == "stop"
    harness.check_finished()


@overlap_on_and_off
def test_never_computes_beyond_the_last_token(overlap: bool) -> None:
    harness = Harness(overlap=overlap)
    harness.add(prompt(5), max_tokens=6)
    harness.run()
    assert sum(plan.num_tokens for plan in harness.runner.plans) == 5 + 6 - 1
    harness.check_finished()


# Cancellation


@overlap_on_and_off
@pytest.mark.parametrize("num_steps", range(7))
@pytest.mark.parametrize("n", [1, 3])
def test_cancel_at_any_time_gives_one_terminal_event(overlap: bool, num_steps: int, n: int) -> None:
    harness = Harness(max_num_tokens=4, overlap=overlap)
    request_id = harness.add(prompt(10), max_tokens=9, n=n)
    other = harness.add(prompt(10), max_tokens=9)
    for _ in range(num_steps):
        harness.step()
    assert harness.cancel(request_id)
    assert not harness.cancel(request_id)
    events = harness.step()
    assert next(e for e in events if isinstance(e, Finished)).request_id == request_id
    reasons = {e.sequence_index: e.finish_reason for e in events if isinstance(e, TokenDelta) and e.request_id == 0}
    assert reasons == dict.fromkeys(range(n), "cancelled")
    harness.run()
    assert harness.answers[other][0].finish_reason == "length"
    assert harness.core.stats().num_finished == {"cancelled": 1, "length": 1}
    harness.check_finished()


def test_cancel_while_preempted_and_in_flight() -> None:
    harness = Harness(num_blocks=9, capacity_policy=MAX_UTILIZATION, overlap=True)
    for first in range(2):
        harness.add(prompt(4, first), max_tokens=25)
    while harness.core.stats().num_preemptions == 0:
        harness.step()
    assert harness.core.stats().num_waiting == 1
    harness.cancel(1)
    harness.run()
    harness.check_finished()


def test_events_of_a_cancellation_are_work() -> None:
    harness = Harness()
    harness.add(prompt(3))
    harness.cancel(0)
    assert harness.core.has_work
    assert [type(event) for event in harness.step()] == [TokenDelta, Finished]
    assert not harness.core.has_work
    harness.check_finished()


def test_cancelling_the_unknown_is_harmless() -> None:
    harness = Harness()
    assert not harness.core.cancel(17)
    assert not harness.core.finish_sequence(17, 0, "stop")
    assert not harness.core.has_work


def test_deadline_is_a_cancellation_with_its_own_reason() -> None:
    harness = Harness()
    harness.add(prompt(3))
    harness.ended_early.add((0, 0))
    assert harness.core.cancel(0, "timeout")
    harness.step()
    assert harness.answers[0][0].finish_reason == "timeout"
    harness.check_finished()


@overlap_on_and_off
def test_one_sequence_ended_from_outside(overlap: bool) -> None:
    harness = Harness(overlap=overlap)
    harness.add(prompt(5), max_tokens=9, n=2)
    for _ in range(4):
        harness.step()
    assert harness.finish_sequence(0, 1)
    assert not harness.finish_sequence(0, 1)
    harness.run()
    assert harness.answers[0][1].finish_reason == "stop" and len(harness.tokens(0, 1)) < 9
    assert len(harness.tokens(0, 0)) == 9
    harness.check_finished()
