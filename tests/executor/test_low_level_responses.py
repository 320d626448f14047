"""`ResponseBuilder` however outputs are cut into pieces, and `ResponseQueue` under many threads."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.executor.tiny_executor import streamed_tokens
from tokenmill.errors import EngineError, ExecutorShutdownError, InvalidParameterError
from tokenmill.executor import FinishReason, OutputConfig, Request, Response, Result, SamplingConfig
from tokenmill.executor.low_level.response_builder import ResponseBuilder
from tokenmill.executor.low_level.response_queue import ResponseQueue
from tokenmill.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

pytestmark = pytest.mark.spec("A4")

METRICS = RequestMetrics(arrival_time=1.0, finished_time=2.0)
ENDS = {
    ("length", None): FinishReason.LENGTH,
    ("stop", None): FinishReason.END_ID,
    ("stop", 7): FinishReason.STOP_WORDS,
    ("cancelled", None): FinishReason.CANCELLED,
    ("timeout", None): FinishReason.TIMED_OUT,
}


def a_request(num_sequences: int = 1, **fields: Any) -> Request:
    sampling = SamplingConfig(temperature=1.0, num_return_sequences=num_sequences)
    return Request([1, 2], 100, sampling_config=sampling, client_id=77, **fields)


def build(request: Request, outputs: list[RequestOutput], normalize: bool = False) -> list[Response]:
    builder = ResponseBuilder(5, request, normalize_log_probs=normalize)
    return [response for output in outputs for response in builder.build(output)]


def log_prob(token_id: int) -> float:
    return -token_id / 8


def piece(index: int, token_ids: list[int], end: tuple[Any, Any]) -> CompletionOutput:
    """A sequence as far as it has come."""
    logprobs = [{token_id: Logprob(log_prob(token_id), 1)} for token_id in token_ids]
    return CompletionOutput(index, token_ids=token_ids, logprobs=logprobs, finish_reason=end[0], stop_reason=end[1])


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[RequestOutput], list[list[int]], list[FinishReason]]:
    """What a reader of a request may see: any prefix of any sequence at any time, the ends, and then `finished`."""
    wholes = draw(st.lists(st.lists(st.integers(10, 40), max_size=6), min_size=1, max_size=3))
    ends = [draw(st.sampled_from(sorted(ENDS, key=str))) for _ in wholes]
    ends = [
        ("stop", None) if not whole and end[0] == "length" else end for whole, end in zip(wholes, ends, strict=True)
    ]
    sequences = [CompletionOutput(index) for index in range(len(wholes))]
    outputs = []
    num_rounds = draw(st.integers(0, 4))
    for number in range(num_rounds + 1):
        for sequence, whole, end in zip(list(sequences), wholes, ends, strict=True):
            if sequence.finish_reason is None:
                is_last = number == num_rounds
                length = len(whole) if is_last else draw(st.integers(len(sequence.token_ids), len(whole)))
                ends_now = length == len(whole) and (is_last or end[0] == "length" or draw(st.booleans()))
                sequences[sequence.index] = piece(sequence.index, whole[:length], end if ends_now else (None, None))
        outputs.append(RequestOutput(5, None, [1, 2], list(sequences), False, METRICS))
    finished = replace(outputs[-1], finished=True)
    outputs = [*outputs, finished] if draw(st.booleans()) else [*outputs[:-1], finished]
    return outputs, wholes, [ENDS[end] for end in ends]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(history=histories())
def test_streamed_responses_do_not_depend_on_the_pieces(history: Any) -> None:
    outputs, wholes, ends = history
    request = a_request(len(wholes), streaming=True, output_config=OutputConfig(return_log_probs=True))
    responses = build(request, outputs)
    assert {(response.request_id, response.client_id) for response in responses} == {(5, 77)}
    for index, (whole, end) in enumerate(zip(wholes, ends, strict=True)):
        assert streamed_tokens(responses, index) == whole
        results = [response.result for response in responses if response.result.sequence_index == index]
        assert len(results) == len(whole) + (end is not FinishReason.LENGTH)
        assert [result.finish_reasons for result in results] == [[FinishReason.NOT_FINISHED]] * (len(results) - 1) + [
            [end]
        ]
        assert [log for result in results for log in result.log_probs[0]] == [log_prob(token_id) for token_id in whole]
        assert results[-1].cum_log_probs == [sum(map(log_prob, whole))]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(history=histories(), exclude=st.booleans())
def test_without_streaming_there_is_one_response_for_each_sequence(history: Any, exclude: bool) -> None:
    outputs, wholes, ends = history
    config = OutputConfig(return_log_probs=True, exclude_input_from_output=exclude)
    responses = build(a_request(len(wholes), output_config=config), outputs, normalize=True)
    prompt = [] if exclude else [1, 2]
    assert [response.result.output_token_ids for response in responses] == [[prompt + whole] for whole in wholes]
    assert [response.result.finish_reasons for response in responses] == [[end] for end in ends]
    assert [response.is_final for response in responses] == [False] * (len(wholes) - 1) + [True]
    assert all(response.result.is_sequence_final for response in responses)
    for response, whole in zip(responses, wholes, strict=True):
        assert response.result.log_probs == [[log_prob(token_id) for token_id in whole]]
        assert response.result.cum_log_probs == [sum(map(log_prob, whole)) / max(len(whole), 1)]


def finished(*token_ids: int, reason: Any = "length") -> RequestOutput:
    sequence = CompletionOutput(0, token_ids=list(token_ids), finish_reason=reason)
    return RequestOutput(5, None, [1, 2], [sequence], True, METRICS)


def test_all_generated_tokens_can_be_streamed() -> None:
    responses = build(a_request(streaming=True, return_all_generated_tokens=True), [finished(10, 11, 12)])
    assert [response.result.output_token_ids for response in responses] == [[[10]], [[10, 11]], [[10, 11, 12]]]


def test_extras_come_only_when_asked_for() -> None:
    plain = build(a_request(streaming=True), [finished(10, 11)])
    assert {(r.result.log_probs, r.result.cum_log_probs, r.result.request_perf_metrics) for r in plain} == {
        (None, None, None)
    }
    config = OutputConfig(return_perf_metrics=True)
    timed = build(a_request(streaming=True, output_config=config), [finished(10, 11)])
    assert [response.result.request_perf_metrics for response in timed] == [None, METRICS]


def test_a_request_that_fails_after_its_last_token_has_one_final_response() -> None:
    builder = ResponseBuilder(5, a_request(streaming=True), normalize_log_probs=False)
    ended = replace(finished(10, 11), finished=False)
    responses = [*builder.build(ended), builder.fail(EngineError("The engine is gone.", remedy="Start anew."))]
    assert [response.is_final for response in responses] == [False, True]
    assert [response.has_error() for response in responses] == [False, True]
    assert (responses[0].error, responses[0].error_msg) == (None, "")
    assert responses[1].error_msg == "The engine is gone. Start anew."
    with pytest.raises(EngineError):
        _ = responses[1].result


# ---- the queue ---------------------------------------------------------------------------------------------------


def response(request_id: int, number: int = 0, *, is_final: bool = False) -> Response:
    """A response that can be told from others."""
    return Response(request_id, None, Result(is_final=is_final, output_token_ids=[[number]], finish_reasons=[]))


def test_responses_are_taken_once_by_request_or_all() -> None:
    queue = ResponseQueue()
    queue.open([1, 2, 3])
    queue.put([response(1, 0), response(2, 0), response(1, 1, is_final=True)])
    assert (queue.num_ready(None), queue.num_ready(1), queue.num_ready(3), queue.num_open) == (3, 2, 0, 2)
    assert queue.take([1, 3], 0) == [response(1, 0), response(1, 1, is_final=True)]
    assert queue.take([1], None) == [], "it has given all; nobody waits for more"
    assert queue.take_any(0) == [response(2, 0)]
    assert queue.take_any(0) == queue.take([2], 0) == queue.take([1, 2], 0.01) == []
    assert queue.num_ready(None) == 0


@pytest.mark.parametrize("request_id", [0, -1, 4, 10**30])
def test_unknown_ids_are_refused(request_id: int) -> None:
    queue = ResponseQueue()
    queue.open([1, 2, 3])
    for ask in (lambda: queue.take([1, request_id], 0), lambda: queue.num_ready(request_id)):
        with pytest.raises(InvalidParameterError) as caught:
            ask()
        assert caught.value.field == "request_id"


def test_nothing_comes_after_the_final_response() -> None:
    queue = ResponseQueue()
    queue.open([1])
    queue.put([response(1, is_final=True)])
    with pytest.raises(AssertionError):
        queue.put([response(1)])


def test_a_closed_queue_gives_what_it_has_and_then_says_so() -> None:
    queue = ResponseQueue()
    queue.open([1, 2])
    queue.put([response(1, is_final=True)])
    queue.close()
    assert queue.take_any(None) == [response(1, is_final=True)]
    assert queue.take_any(0.01) == [], "request 2 is still open"
    queue.put([response(2, is_final=True)])
    assert queue.take([1, 2], None) == [response(2, is_final=True)]
    assert queue.take([1, 2], None) == []
    with pytest.raises(ExecutorShutdownError):
        queue.take_any(None)


def test_who_waits_is_woken_by_responses_ends_and_close() -> None:
    queue = ResponseQueue()
    queue.open([1, 2])
    outcomes: dict[str, Any] = {}

    def wait_any() -> None:
        try:
            outcomes["any"] = queue.take_any(None)
        except ExecutorShutdownError:
            outcomes["any"] = "closed"

    waiters = [threading.Thread(target=lambda: outcomes.update(one=queue.take([1], None))) for _ in range(2)]
    for waiter in waiters:
        waiter.start()
    queue.put([response(1, is_final=True)])
    for waiter in waiters:
        waiter.join(20)
        assert not waiter.is_alive(), "one of the two got the response; the other must not wait for another"
    late = threading.Thread(target=wait_any)
    queue.put([response(2, is_final=True)])
    assert len(queue.take([2], None)) == 1
    late.start()
    time.sleep(0.02)
    queue.close()
    late.join(20)
    assert outcomes["any"] == "closed"


def test_many_threads_lose_nothing_and_get_nothing_twice() -> None:
    queue = ResponseQueue()
    num_requests, num_responses = 60, 20
    queue.open(range(1, num_requests + 1))
    taken: list[list[Response]] = [[] for _ in range(8)]

    def take(number: int) -> None:
        own_ids = list(range(1 + number, num_requests + 1, 8))
        try:
            while True:
                taken[number] += queue.take_any(0.005) if number % 2 else queue.take(own_ids, 0.005)
                if number % 2 == 0 and not queue.num_open:
                    taken[number] += queue.take(own_ids, 0)
                    return
        except ExecutorShutdownError:
            return

    def put(first: int) -> None:
        for number in range(num_responses):
            for request_id in range(first, num_requests + 1, 3):
                queue.put([response(request_id, number, is_final=number == num_responses - 1)])

    takers = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    putters = [threading.Thread(target=put, args=(first,)) for first in (1, 2, 3)]
    for thread in takers + putters:
        thread.start()
    for thread in putters:
        thread.join(60)
    queue.close()
    for thread in takers:
        thread.join(60)
        assert not thread.is_alive()
    everything = sorted((r.request_id, r.result.output_token_ids[0][0]) for part in taken for r in part)
    assert everything == [(i, n) for i in range(1, num_requests + 1) for n in range(num_responses)]
    for part in taken:
        for request_id in range(1, num_requests + 1):
            numbers = [r.result.output_token_ids[0][0] for r in part if r.request_id == request_id]
            assert numbers == sorted(numbers), "responses of a request come in order"
