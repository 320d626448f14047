"""Many threads submit to, abort on and shut down a `GenerationExecutor` at once: each request ends exactly once.

`GenerationResult.finish` asserts that it is not called twice; here every result is also counted from outside.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.config import KvCacheConfig, LlmArgs
from tokenmill.engine.request import GenerationRequest
from tokenmill.errors import ExecutorShutdownError, QueueFullError, TokenmillError, UserError
from tokenmill.executor.executor import GenerationExecutor
from tokenmill.executor.result import GenerationResult
from tokenmill.outputs import RequestMetrics, RequestOutput
from tokenmill.sampling_params import SamplingParams


class Endings:
    """Counts the terminal events of all results; a mistake on the engine's thread is kept, not lost."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.lock = threading.Lock()

    def count(self, request_id: int) -> None:
        with self.lock:
            self.counts[request_id] = self.counts.get(request_id, 0) + 1


@pytest.fixture
def endings(monkeypatch: pytest.MonkeyPatch) -> Endings:
    """Counts every call of `GenerationResult.finish`."""
    endings = Endings()
    finish = GenerationResult.finish

    def counted(self: GenerationResult, metrics: RequestMetrics, error: TokenmillError | None = None) -> None:
        endings.count(self.request_id)
        finish(self, metrics, error)

    monkeypatch.setattr(GenerationResult, "finish", counted)
    return endings


def start(model_dir: Path, **changes: Any) -> GenerationExecutor:
    """A small in-process executor without a tokenizer."""
    options: dict[str, Any] = {
        "dtype": "float32", "device": "cpu", "max_batch_size": 4,
        "kv_cache_config": KvCacheConfig(max_tokens=1024, tokens_per_block=16), **changes,
    }  # fmt: skip
    return GenerationExecutor.create(LlmArgs(model=resolve_model(model_dir), **options), None)


@pytest.fixture
def executor(tiny_model_dir: Path) -> Iterator[GenerationExecutor]:
    executor = start(tiny_model_dir)
    yield executor
    executor.shutdown()


def a_request(executor: GenerationExecutor, max_tokens: int) -> GenerationRequest:
    prompt = tuple(range(20, 30))
    return GenerationRequest(executor.next_request_id(), prompt, SamplingParams(max_tokens=max_tokens))


def submit(executor: GenerationExecutor, max_tokens: int, *, streaming: bool = False) -> GenerationResult:
    return executor.submit(a_request(executor, max_tokens), streaming=streaming)


def run_threads(*works: Callable[[], None]) -> None:
    """Run all at once; the first exception of any is raised here."""
    errors: list[BaseException] = []
    gate = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            gate.wait(20)
            work()
        except BaseException as error:  # handed to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a caller hangs"
    if errors:
        raise errors[0]


def outcome(result: GenerationResult) -> str:
    """How a request ended: its finish reason, or the code of its error."""
    try:
        output: RequestOutput = result.result(timeout=60)
    except TokenmillError as error:
        return error.code
    assert output.finished
    reason = output.outputs[0].finish_reason
    assert reason is not None
    return reason


@pytest.mark.parametrize("seed", range(3))
def test_submits_and_aborts_race_and_every_request_ends_once(
    executor: GenerationExecutor, endings: Endings, seed: int
) -> None:
    results: list[GenerationResult] = []
    is_over = threading.Event()

    def submit_some(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        for _ in range(15):
            results.append(submit(executor, rng.choice([1, 3, 20, 300]), streaming=rng.random() < 0.5))
            time.sleep(rng.choice([0, 0, 0.001]))

    def abort_some(number: int) -> None:
        rng = random.Random(-seed * 100 - number)
        while not is_over.is_set():
            if results:
                result = rng.choice(results)
                was_done = result.done
                assert not (result.abort() and was_done), "abort of what has ended says that it was under way"
            executor.abort_request(rng.randrange(10**6))
            time.sleep(0.001)

    def read_all() -> None:
        read = 0
        while read < 60:
            if read == len(results):
                time.sleep(0.001)
                continue
            outputs = 0
            for output in results[read]:
                outputs += 1
                assert output.request_id == results[read].request_id
            assert outputs >= 1
            read += 1
        is_over.set()

    aborters = [lambda number=number: abort_some(number) for number in range(2)]
    submitters = [lambda number=number: submit_some(number) for number in range(4)]
    run_threads(*submitters, *aborters, read_all)
    assert {outcome(result) for result in results} <= {"length", "stop", "cancelled"}
    assert endings.counts == {result.request_id: 1 for result in results}
    executor.check_integrity()
    stats = executor.stats()
    assert sum(stats.num_finished.values()) == 60
    assert stats.num_running == stats.num_waiting == 0
    assert stats.kv_cache.num_free_blocks == stats.kv_cache.num_blocks


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.01, 0.03])
def test_a_shutdown_in_the_middle_ends_every_request_once(tiny_model_dir: Path, endings: Endings, delay: float) -> None:
    """Submitters, aborters and three shutdowns at once. What was taken ends; what comes later is refused."""
    executor = start(tiny_model_dir)
    taken: list[GenerationResult] = []
    refusals: list[TokenmillError] = []

    def submit_until_refused() -> None:
        while True:
            try:
                taken.append(submit(executor, 400, streaming=len(taken) % 2 == 0))
            except QueueFullError:
                time.sleep(0.001)
            except ExecutorShutdownError as error:
                refusals.append(error)
                return

    def abort_until_shut_down() -> None:
        while not refusals:
            if taken:
                executor.abort_request(random.choice(taken).request_id)
            time.sleep(0.0005)

    def shut_down() -> None:
        time.sleep(delay)
        executor.shutdown(grace_period=0.1)

    run_threads(*[submit_until_refused] * 3, *[abort_until_shut_down] * 2, *[shut_down] * 3)
    assert len(refusals) == 3
    assert {outcome(result) for result in taken} <= {"length", "stop", "cancelled", "executor_shutdown"}
    assert endings.counts == {result.request_id: 1 for result in taken}
    executor.shutdown()
    executor.check_integrity()
    assert not executor.abort_request(taken[0].request_id if taken else 1)


def test_waiters_of_one_request_all_see_its_end(executor: GenerationExecutor) -> None:
    result = submit(executor, 5)
    outputs: list[RequestOutput] = []
    run_threads(*[lambda: outputs.append(result.result(timeout=60))] * 6)
    assert len(outputs) == 6
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1


def test_many_aborts_of_one_request_cancel_it_once(executor: GenerationExecutor, endings: Endings) -> None:
    result = submit(executor, 900, streaming=True)
    next(result)
    run_threads(*[lambda: [executor.abort_request(result.request_id) for _ in range(50)] and None] * 4)
    assert outcome(result) == "cancelled"
    assert endings.counts == {result.request_id: 1}
    executor.check_integrity()
    assert executor.stats().num_finished == {"cancelled": 1}


def test_refused_requests_leave_nothing_behind(tiny_model_dir: Path, endings: Endings) -> None:
    """Requests that can never run, and requests that find the queue full, race with good ones."""
    executor = start(tiny_model_dir, max_batch_size=2, max_queue_size=4)
    taken: list[GenerationResult] = []
    num_refused = {"full": 0, "bad": 0}

    def submit_good() -> None:
        for _ in range(20):
            try:
                taken.append(submit(executor, 5))
            except QueueFullError:
                num_refused["full"] += 1

    def submit_bad() -> None:
        for _ in range(50):
            with pytest.raises(UserError):
                submit(executor, 10**6)
            num_refused["bad"] += 1

    run_threads(*[submit_good] * 4, submit_bad)
    assert {outcome(result) for result in taken} <= {"length", "stop"}
    assert len(taken) + num_refused["full"] == 80
    assert num_refused["full"] > 0 and num_refused["bad"] == 50
    executor.check_integrity()
    assert sum(executor.stats().num_finished.values()) == len(taken) == len(endings.counts)
    executor.shutdown()
