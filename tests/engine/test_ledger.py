"""What is told about a request, row by row."""

import pytest

from tokenmill.engine.events import Failed, Finished, TokenDelta
from tokenmill.engine.ledger import Ledger
from tokenmill.engine.placement import Placement
from tokenmill.engine.plan import Row, RowOutput
from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.sequence import Request, SequenceStatus, make_request
from tokenmill.errors import OutOfMemoryError
from tokenmill.kv_cache.manager import KvCacheManager
from tokenmill.outputs import Logprob
from tokenmill.sampling_params import SamplingParams

ROW = Row(0, 2, 1, True)


def opened(n: int = 1, **sampling: object) -> tuple[Ledger, Request]:
    """A ledger with one request that has a prompt of 3 tokens; 40 and 41 end it, 41 as a stop token."""
    params = SamplingParams(n=n, temperature=1.0, **{"max_tokens": 3, **sampling})
    inputs = GenerationRequest(6, (1, 2, 3), params, end_ids=(40,), stop_token_ids=(41,), arrival_time=0.5)
    ledger = Ledger(Placement(KvCacheManager(20, 4), 4), clock=lambda: 8.0)
    request = make_request(inputs, (0.0, 0), 60, 0)
    ledger.open(request)
    return ledger, request


def deliver(ledger: Ledger, request: Request, *outputs: RowOutput, index: int = 0, row: Row = ROW) -> list[object]:
    for output in outputs:
        ledger.deliver(request.sequences[index], row, output, now=2.0)
    return list(ledger.take_events())


def test_tokens_then_the_end_by_length() -> None:
    ledger, request = opened()
    logprobs = {7: Logprob(-0.5, 1)}
    assert deliver(ledger, request, RowOutput(7, logprobs)) == [TokenDelta(6, 0, (7,), (logprobs,))]
    events = deliver(ledger, request, RowOutput(8), RowOutput(9))
    assert events[:2] == [TokenDelta(6, 0, (8,)), TokenDelta(6, 0, (9,), finish_reason="length")]
    assert isinstance(events[2], Finished) and len(events) == 3
    metrics = events[2].metrics
    assert (metrics.arrival_time, metrics.first_token_time, metrics.finished_time) == (0.5, 2.0, 8.0)
    assert not ledger.requests and not ledger.has_events
    assert ledger.counters.num_finished == {"length": 1} and ledger.counters.num_generated_tokens == 3


@pytest.mark.parametrize(
    ("token_id", "include", "token_ids", "stop_reason"),
    [(40, False, (), None), (40, True, (), None), (41, False, (), 41), (41, True, (41,), 41)],
)
def test_end_and_stop_tokens(token_id: int, include: bool, token_ids: tuple[int, ...], stop_reason: int | None) -> None:
    ledger, request = opened(include_stop_str_in_output=include)
    logprobs = {token_id: Logprob(-0.5, 1)}
    delta = deliver(ledger, request, RowOutput(token_id, logprobs))[0]
    expected_logprobs = (logprobs,) if token_ids else ()
    assert delta == TokenDelta(6, 0, token_ids, expected_logprobs, (), "stop", stop_reason)


def test_min_tokens_come_before_any_end() -> None:
    ledger, request = opened(min_tokens=2)
    deltas = deliver(ledger, request, RowOutput(40), RowOutput(41), RowOutput(40))
    assert [delta.finish_reason for delta in deltas[:3]] == [None, None, "stop"]


def test_prompt_logprobs_are_told_once() -> None:
    ledger, request = opened(prompt_logprobs=0)
    entries = tuple({token_id: Logprob(-1.0, 1)} for token_id in (2, 3))
    first = deliver(ledger, request, RowOutput(prompt_logprobs=entries[:1]), row=Row(0, 0, 1, False, True))
    assert first == [TokenDelta(6, 0, prompt_logprobs=entries[:1])]
    again = deliver(ledger, request, RowOutput(5, None, entries), row=Row(0, 0, 3, True, True))
    assert again == [TokenDelta(6, 0, (5,), (), entries[1:])]
    assert deliver(ledger, request, RowOutput(), row=Row(0, 0, 1, False)) == []


def test_request_ends_with_its_last_sequence() -> None:
    ledger, request = opened(n=2)
    assert not any(isinstance(e, Finished) for e in deliver(ledger, request, RowOutput(40), index=1))
    assert isinstance(deliver(ledger, request, RowOutput(40))[-1], Finished)


def test_ended_from_outside() -> None:
    ledger, request = opened(n=2)
    ledger.finish(request.sequences[:1], "stop")
    assert ledger.take_events() == [TokenDelta(6, 0, finish_reason="stop")]
    assert request.sequences[1].status is SequenceStatus.WAITING, "it need not wait for sequence 0 any more"
    ledger.finish(request.sequences, "timeout")
    assert ledger.take_events() == [TokenDelta(6, 1, finish_reason="timeout"), Finished(6, request.metrics)]


def test_failure_ends_all_sequences_at_once() -> None:
    ledger, request = opened(n=3)
    error = OutOfMemoryError("full")
    ledger.fail(request, error)
    assert ledger.take_events() == [Failed(6, error, request.metrics)]
    assert {sequence.status for sequence in request.sequences} == {SequenceStatus.FINISHED}
    assert not ledger.requests and ledger.counters.num_finished == {"out_of_memory": 1}
