"""Waits notice Ctrl-C even when another thread got the signal, and are over in time."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tokenmill.executor import waiting
from tokenmill.executor.in_process import InProcessExecutor
from tokenmill.executor.low_level.response_queue import ResponseQueue
from tokenmill.executor.managed_thread import ManagedThread
from tokenmill.executor.result import GenerationResult
from tokenmill.executor.tokenizer_source import TokenizerSource
from tokenmill.outputs import RequestMetrics
from tokenmill.sampling_params import SamplingParams

ENOUGH = 20.0
"""Seconds after which a wait that missed the signal gives up, so that its test fails."""


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    """A job in the background starts with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def result() -> GenerationResult:
    return GenerationResult(
        1, None, (5,), SamplingParams(), streaming=True, arrival_time=0.0, abort=lambda request_id: True
    )


def open_queue() -> ResponseQueue:
    responses = ResponseQueue()
    responses.open([1])
    return responses


def start_that_never_ends() -> None:
    """Gives up by itself, too."""
    given_up = threading.Event()

    def build(report: Callable[[str, int, int], None]) -> None:
        while not given_up.wait(0.05):
            report("weights", 1, 2)

    threading.Timer(ENOUGH, given_up.set).start()
    try:
        InProcessExecutor(build, None, max_requests=1)  # type: ignore[arg-type]
    finally:
        given_up.set()


WAITS: dict[str, Callable[[], object]] = {
    "for a result": lambda: result().result(ENOUGH),
    "for the first token": lambda: finished_later(result()).__next__(),
    "for a response": lambda: open_queue().take([1], ENOUGH),
    "for any response": lambda: open_queue().take_any(ENOUGH),
    "for an item": lambda: waiting.get(queue.SimpleQueue(), ENOUGH),
    "for a thread": lambda: sleeping_thread().join(ENOUGH),
    "for an engine": start_that_never_ends,
}


def finished_later(waiter: GenerationResult) -> GenerationResult:
    timer = threading.Timer(ENOUGH, waiter.finish, [RequestMetrics(arrival_time=0.0)])
    timer.daemon = True
    timer.start()
    return waiter


def sleeping_thread() -> ManagedThread:
    thread = ManagedThread(lambda: time.sleep(ENOUGH), name="sleeper", on_error=lambda error: None)
    thread.start()
    return thread


@pytest.mark.parametrize("wait", WAITS)
def test_ctrl_c_that_another_thread_got_ends_a_wait(wait: str) -> None:
    signaller = threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
    signaller.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        WAITS[wait]()
    assert time.monotonic() - started < ENOUGH / 2
    signaller.join()


def test_waits_are_over_in_time() -> None:
    started = time.monotonic()
    with pytest.raises(queue.Empty):
        waiting.get(queue.SimpleQueue(), 0.6)
    condition = threading.Condition()
    with condition:
        assert not waiting.wait_for(condition, lambda: False, 0.6)
    assert not sleeping_thread().join(0.6)
    assert time.monotonic() - started >= 1.8


def test_what_is_there_is_not_waited_for() -> None:
    items: queue.SimpleQueue[int] = queue.SimpleQueue()
    items.put(3)
    assert waiting.get(items) == 3
    condition = threading.Condition()
    with condition:
        assert waiting.wait_for(condition, lambda: True)
    thread = threading.Thread(target=lambda: None)
    thread.start()
    assert waiting.join(thread)


def test_a_start_that_is_given_up_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the caller's tokenizer loads: the engine's thread ends when it next says how far it is."""
    is_building = threading.Event()
    threads: list[threading.Thread] = []

    def build(report: Callable[[str, int, int], None]) -> None:
        threads.append(threading.current_thread())
        is_building.set()
        while True:
            time.sleep(0.01)
            report("weights", 1, 2)

    def load(source: TokenizerSource) -> None:
        assert is_building.wait(ENOUGH)
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenizerSource, "load", load)
    with pytest.raises(KeyboardInterrupt):
        InProcessExecutor(build, TokenizerSource(tokenizer=object()), max_requests=1)  # type: ignore[arg-type]
    assert [thread.is_alive() for thread in threads] == [False]
