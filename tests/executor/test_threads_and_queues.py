"""`ManagedThread`, `IterationResultQueue`, `DeadlineTimer`, `RequestTable`: small parts that may lose nothing."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.executor.conftest import wait_until
from tokenmill import SamplingParams
from tokenmill.engine.request import GenerationRequest
from tokenmill.errors import EngineError, ExecutorShutdownError, QueueFullError
from tokenmill.executor.deadlines import DeadlineTimer
from tokenmill.executor.executor import ProgressCallback
from tokenmill.executor.in_process import InProcessExecutor
from tokenmill.executor.iteration_queue import IterationResultQueue
from tokenmill.executor.managed_thread import ManagedThread, join_ending
from tokenmill.executor.postproc import OutputDelta
from tokenmill.executor.request_table import RequestTable
from tokenmill.executor.result import GenerationResult
from tokenmill.outputs import RequestMetrics
from tokenmill.telemetry.stats import EngineStats, IterationStats, KvCacheStats, merge_stats

pytestmark = pytest.mark.spec("B5")


def record(step: int) -> IterationStats:
    return IterationStats(0, step, 0.0, 0.1, 1, 0, 0, 1, 0, 5)


def test_an_exception_reaches_the_owner(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[Exception] = []

    def task() -> None:
        raise RuntimeError("lost?")

    thread = ManagedThread(task, name="test", on_error=errors.append)
    thread.start()
    assert thread.join(5.0)
    assert [str(error) for error in errors] == ["lost?"]
    assert thread.error is errors[0]
    assert "The thread test ended with an error" in caplog.text


def test_threads_that_were_told_to_end_are_waited_for_and_no_others() -> None:
    goes_on, may_end = threading.Event(), threading.Event()
    staying, ending = (ManagedThread(event.wait, name="test", on_error=print) for event in (goes_on, may_end))  # type: ignore[arg-type]
    staying.start()
    ending.start()
    ending.is_told_to_end()
    join_ending(0.05)
    assert ending.is_alive, "the time is a limit"
    threading.Timer(0.2, may_end.set).start()
    join_ending(30.0)
    assert (staying.is_alive, ending.is_alive) == (True, False)
    goes_on.set()
    assert staying.join(5.0)


def test_what_a_thread_ran_is_free_when_it_has_ended() -> None:
    def task() -> None:
        pass

    thread, reference = ManagedThread(task, name="test", on_error=print), weakref.ref(task)
    del task
    thread.start()
    assert thread.join(5.0)
    assert reference() is None


class Panic(BaseException):
    """What libraries written in Rust raise when they have a mistake."""


def test_what_is_no_exception_reaches_the_owner_too() -> None:
    errors: list[Exception] = []

    def task() -> None:
        raise Panic("index out of bounds")

    thread = ManagedThread(task, name="test", on_error=errors.append)
    thread.start()
    assert thread.join(5.0)
    assert [str(error) for error in errors] == ["Panic: index out of bounds"]
    assert isinstance(errors[0].__cause__, Panic)


def test_an_engine_whose_build_panics_is_not_waited_for() -> None:
    def build(report: ProgressCallback) -> Any:
        raise Panic("index out of bounds")

    with pytest.raises(EngineError, match="Panic: index out of bounds"):
        InProcessExecutor(build, None, max_requests=1)


def test_an_owner_that_raises_too_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    def fail(error: Exception | None = None) -> None:
        raise RuntimeError("again")

    thread = ManagedThread(fail, name="test", on_error=fail)
    thread.start()
    assert thread.join(5.0)
    critical = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
    assert critical == ["The error of thread test could not be handled."]


def test_a_task_that_ends_is_no_error_and_join_on_itself_returns() -> None:
    joined: list[bool] = []
    thread = ManagedThread(lambda: joined.append(thread.join()), name="test", on_error=lambda error: None)
    assert thread.join(), "not started: nothing to wait for"
    thread.start()
    assert thread.join(5.0)
    assert joined == [False]
    assert thread.error is None and not thread.is_alive


def test_iteration_records_are_bounded_and_read_once() -> None:
    records = IterationResultQueue(max_records=3)
    assert records.get_all() == []
    records.put_all(record(step) for step in range(5))
    assert records.num_dropped == 2
    assert len(records) == 3
    assert [one.step for one in records.get_all()] == [2, 3, 4]
    assert records.get_all() == []


def test_a_reader_of_records_waits_for_the_first() -> None:
    records = IterationResultQueue()
    threading.Timer(0.05, lambda: records.put(record(1))).start()
    assert [one.step for one in records.get_all(timeout=10.0)] == [1]
    started = time.monotonic()
    assert records.get_all(timeout=0.05) == []
    assert time.monotonic() - started >= 0.05


def test_deadlines_come_in_their_order() -> None:
    expired: list[int] = []
    timer = DeadlineTimer(range(10), expired.append, lambda error: None)
    now = time.monotonic()
    for request_id, delay in ((3, 0.09), (1, 0.03), (2, 0.06), (4, 100.0)):
        timer.add(request_id, now + delay)
    wait_until(lambda: len(expired) == 3)
    timer.close()
    timer.close()
    assert expired == [1, 2, 3]
    timer.add(5, now)
    time.sleep(0.05)
    assert expired == [1, 2, 3], "no calls after the end"


def test_deadlines_of_requests_that_ended_take_no_memory() -> None:
    expired: list[int] = []
    open_requests = set(range(5000))
    timer = DeadlineTimer(open_requests, expired.append, lambda error: None)
    now = time.monotonic()
    for request_id in range(100_000):
        open_requests.discard(request_id - 50)
        timer.add(request_id, now + (3600.0 if request_id else 0.3))
    assert len(timer._heap) < 11_000
    wait_until(lambda: expired == [0] or time.monotonic() > now + 1.0)
    timer.close()


def open_request(table: RequestTable, request_id: int) -> GenerationResult:
    request = GenerationRequest(request_id, (1, 2), SamplingParams(), arrival_time=1.0)
    return table.open(request, None, streaming=False, abort=lambda _: False)


def test_the_table_gives_one_terminal_event_to_each(caplog: pytest.LogCaptureFixture) -> None:
    table = RequestTable(max_requests=3)
    results = [open_request(table, request_id) for request_id in range(3)]
    with pytest.raises(QueueFullError):
        open_request(table, 3)
    table.push(0, OutputDelta(0, "a", (1,), finish_reason="stop"))
    assert table.finish(0, None, RequestMetrics(1.0))
    assert not table.finish(0, EngineError("late"))
    table.push(0, OutputDelta(0, "late", (2,)))
    assert results[0].result(0).outputs[0].text == "a"
    table.close(ExecutorShutdownError("first"))
    table.close(EngineError("second"))
    for _ in range(3):
        with pytest.raises(ExecutorShutdownError, match="first") as caught:
            open_request(table, 4)
        assert caught.value is not table.closed_by, "each has a traceback of its own"
    assert not table.wait_until_idle(0.01)
    assert table.finish_all(EngineError("the end")) == [1, 2]
    assert table.wait_until_idle(0.0)
    stats = table.with_outcomes(EngineStats(num_steps=5))
    assert (stats.num_finished, stats.num_rejected, stats.num_steps) == ({"stop": 1, "engine_error": 2}, 1, 5)


def test_terminal_events_from_many_threads() -> None:
    table = RequestTable(max_requests=1000)
    results = [open_request(table, request_id) for request_id in range(500)]
    wins: list[int] = []

    def finish() -> None:
        for request_id in range(500):
            table.push(request_id, OutputDelta(0, "x", (1,)))
            if table.finish(request_id):
                wins.append(request_id)

    threads = [threading.Thread(target=finish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == list(range(500))
    assert all(result.done for result in results)


def test_a_result_starts_anew_only_if_nobody_saw_it() -> None:
    table = RequestTable(max_requests=10)
    unseen, seen = open_request(table, 1), open_request(table, 2)
    for request_id in (1, 2):
        table.push(request_id, OutputDelta(0, "abc", (1,)))
    assert seen.outputs[0].text == "abc"
    assert table.restart(1)
    assert not table.restart(2)
    assert not table.restart(3)
    table.push(1, OutputDelta(0, "d", (2,), finish_reason="length"))
    table.finish(1)
    assert not table.restart(1)
    assert (unseen.result(0).outputs[0].text, unseen.result(0).outputs[0].token_ids) == ("d", [2])


counts = st.integers(0, 1000)
caches = st.builds(KvCacheStats, counts, counts, counts, st.just(16), counts, counts, counts)
engines = st.builds(
    EngineStats,
    counts, counts, counts, counts, counts, counts,
    st.dictionaries(st.sampled_from(["stop", "length", "cancelled"]), counts),
    st.none() | st.floats(0, 1e6),
    kv_cache=caches,
)  # fmt: skip


@given(st.lists(engines, max_size=4), st.lists(engines, max_size=4))
def test_merged_statistics_are_sums_in_any_grouping(left: list[EngineStats], right: list[EngineStats]) -> None:
    whole = merge_stats([*left, *right])
    assert merge_stats([merge_stats(left), merge_stats(right)]) == whole
    assert whole.num_generated_tokens == sum(one.num_generated_tokens for one in (*left, *right))
    assert sum(whole.num_finished.values()) == sum(sum(one.num_finished.values()) for one in (*left, *right))
    assert whole.kv_cache.num_blocks == sum(one.kv_cache.num_blocks for one in (*left, *right))
