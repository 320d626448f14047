"""The low-level `Executor` when requests are cancelled, fail or are cut off: each has one final response."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.executor.tiny_executor import (
    ANSWER_ONLY,
    PROMPT,
    await_all,
    make_executor,
    make_llm,
    only,
    plain_tokens,
    streamed_tokens,
    wait_until,
)
from tokenmill import LLM
from tokenmill.engine.scheduler import Scheduler
from tokenmill.errors import (
    EngineError,
    ExecutorShutdownError,
    QueueFullError,
)
from tokenmill.executor import (
    Executor,
    FinishReason,
    Request,
)

pytestmark = pytest.mark.spec("A4")


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> Iterator[LLM]:
    with make_llm(tiny_model_dir) as llm:
        yield llm


@pytest.fixture(scope="module")
def executor(tiny_model_dir: Path) -> Iterator[Executor]:
    with make_executor(tiny_model_dir) as executor:
        yield executor
        executor._executor.check_integrity()
        assert executor._queue.num_open == executor.get_num_responses_ready() == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_a_cancelled_request_ends_once_and_says_so(executor: Executor, llm: LLM, streaming: bool) -> None:
    request = Request(PROMPT, 1500, streaming=streaming, end_id=-1, output_config=ANSWER_ONLY)
    request_id = executor.enqueue_request(request)
    responses = executor.await_responses(60, request_id) if streaming else executor.await_responses(0.05, request_id)
    assert bool(responses) == streaming
    assert executor.cancel_request(request_id)
    responses += await_all(executor, [request_id])[request_id]
    tokens = streamed_tokens(responses)
    assert responses[-1].result.finish_reasons == [FinishReason.CANCELLED]
    assert len(tokens) < 1500
    assert tokens[:20] == plain_tokens(llm, PROMPT, 20)[: len(tokens)]
    assert not executor.cancel_request(request_id)
    assert not executor.cancel_request(10**9)
    assert executor.await_responses(0) == []


def test_a_failing_request_has_an_error_and_others_go_on(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_executor(tiny_model_dir) as executor:
        runner = executor._executor._engine.runner
        run = runner.run
        monkeypatch.setattr(runner, "run", lambda plan: run(plan) if plan.step != 2 else 1 / 0)
        request_id = executor.enqueue_request(Request(PROMPT, 10, streaming=True, end_id=-1, client_id=9))
        responses = await_all(executor, [request_id])[request_id]
        assert [response.has_error() for response in responses] == [False, False, True]
        assert (responses[-1].is_final, responses[-1].client_id) == (True, 9)
        assert isinstance(responses[-1].error, EngineError) and "ZeroDivisionError" in responses[-1].error_msg
        with pytest.raises(EngineError):
            _ = responses[-1].result
        assert not only(executor, Request(PROMPT, 3, end_id=-1)).has_error()


def test_a_dead_engine_ends_every_request(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_executor(tiny_model_dir) as executor:
        assert executor.can_enqueue_requests()
        monkeypatch.setattr(Scheduler, "commit", lambda self, plan, output: 1 / 0)
        request_ids = executor.enqueue_requests([Request(PROMPT, 9, streaming=n % 2 == 0) for n in range(4)])
        for responses in await_all(executor, request_ids).values():
            assert [type(response.error) for response in responses] == [EngineError]
        assert not executor.can_enqueue_requests()
        with pytest.raises(EngineError):
            executor.enqueue_request(Request(PROMPT, 3))


def test_a_mistake_in_a_response_ends_its_request_alone(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tokenmill.executor.low_level.response_builder._finish_reason", lambda sequence: 1 / 0)
        response = only(executor, Request(PROMPT, 3, end_id=-1))
    assert isinstance(response.error, EngineError)
    assert not only(executor, Request(PROMPT, 3, end_id=-1)).has_error()


def test_a_full_queue_refuses_the_whole_list(tiny_model_dir: Path) -> None:
    with make_executor(tiny_model_dir, max_batch_size=1, max_queue_size=2) as executor:
        long = Request(PROMPT, 1500, end_id=-1)
        first = executor.enqueue_request(long)
        with pytest.raises(QueueFullError):
            executor.enqueue_requests([long] * 3)
        others: list[int] = []

        def enqueue_two() -> bool:
            try:
                others.extend(executor.enqueue_requests([long] * 2))
            except QueueFullError:  # those of the refused list are still being cancelled
                return False
            return True

        wait_until(enqueue_two)
        assert not executor.can_enqueue_requests()
        for request_id in (first, *others):
            executor.cancel_request(request_id)
        responses = await_all(executor, [first, *others])
        assert [len(responses[request_id]) for request_id in (first, *others)] == [1, 1, 1]
        assert executor.can_enqueue_requests()


def test_shutdown_ends_open_requests_and_keeps_their_responses(tiny_model_dir: Path) -> None:
    executor = make_executor(tiny_model_dir)
    done = executor.enqueue_request(Request(PROMPT, 2, end_id=-1))
    wait_until(lambda: executor.get_num_responses_ready(done) == 1)
    request_ids = executor.enqueue_requests(
        [Request(PROMPT, 1500, streaming=number % 2 == 0, end_id=-1) for number in range(12)]
    )
    outcomes: list[Any] = []

    def wait() -> None:
        try:
            while True:
                outcomes.extend(executor.await_responses(request_id=request_ids[0]) or [None])
                if outcomes[-1] is None:
                    return
        except ExecutorShutdownError as error:
            outcomes.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    stoppers = [threading.Thread(target=executor.shutdown) for _ in range(3)]
    for thread in stoppers:
        thread.start()
    for thread in [*stoppers, waiter]:
        thread.join(60)
        assert not thread.is_alive()
    assert isinstance(outcomes[-2].error, ExecutorShutdownError), "the waiter got the final response, and then none"
    rest = executor.await_responses()
    finals = [response for response in rest if response.is_final]
    assert sorted(response.request_id for response in finals) == [done, *request_ids[1:]]
    assert {response.request_id for response in finals if not response.has_error()} == {done}
    assert all(isinstance(response.error, ExecutorShutdownError | None) for response in finals)
    with pytest.raises(ExecutorShutdownError):
        executor.await_responses()
    with pytest.raises(ExecutorShutdownError):
        executor.enqueue_request(Request(PROMPT, 2))
    assert not executor.can_enqueue_requests()
    assert not executor.cancel_request(request_ids[0])
    assert not [thread for thread in threading.enumerate() if thread is executor._collector._thread]


def test_racing_enqueues_and_shutdown_lose_no_final_response(tiny_model_dir: Path) -> None:
    executor = make_executor(tiny_model_dir)
    enqueued: list[list[int]] = [[] for _ in range(4)]

    def enqueue(number: int) -> None:
        try:
            while True:
                enqueued[number].append(executor.enqueue_request(Request(PROMPT, 4, streaming=number % 2 == 0)))
        except (ExecutorShutdownError, QueueFullError):
            return

    threads = [threading.Thread(target=enqueue, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(enqueued))
    executor.shutdown()
    for thread in threads:
        thread.join(60)
    finals = [response.request_id for response in executor.await_responses() if response.is_final]
    assert sorted(finals) == sorted(request_id for part in enqueued for request_id in part)
