"""Processes are killed, stopped and fed nonsense under load: every request ends once, and what dies comes back.

What a request gives after a second attempt is compared with the engine in this process.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from tests.executor.conftest import NAN_TOKEN, make_llm, wait_until, wait_until_idle
from tokenmill import LLM, RequestOutput, SamplingParams
from tokenmill.config import WorkerConfig
from tokenmill.errors import TokenmillError, WorkerDiedError
from tokenmill.executor.proxy import GenerationExecutorProxy
from tokenmill.executor.result import GenerationResult

pytestmark = [pytest.mark.spec("B2"), pytest.mark.spec("F2"), pytest.mark.spec("F3")]

TEXTS = ["the quick brown fox", "a stitch in time", "rain"] * 4
LENGTH = 400
PARAMS = [
    SamplingParams(max_tokens=LENGTH, ignore_eos=True, temperature=1.0, seed=seed, bad_token_ids=[NAN_TOKEN])
    for seed in range(len(TEXTS))
]
QUICK = WorkerConfig(heartbeat_interval=0.1, stall_timeout=3.0, restart_backoff=0.1, max_restarts=100)


@pytest.fixture(scope="module")
def expected(reference: LLM) -> list[RequestOutput]:
    """What every request must give."""
    outputs: list[RequestOutput] = reference.generate(TEXTS, PARAMS)
    return outputs


@pytest.fixture(scope="module")
def two_replicas(model_dir: Path, expected: list[RequestOutput]) -> Iterator[LLM]:
    with make_llm(model_dir, num_replicas=2, worker_config=QUICK) as llm:
        before = holdings(llm)
        yield llm
        assert llm.stats().workers.num_restarts > 5
        wait_until(lambda: holdings(llm) == before)


def holdings(llm: LLM) -> tuple[int, int, int]:
    """Descriptors and children of this process, and files of the executor: what must not grow with restarts."""
    gc.collect()
    process = psutil.Process()
    return process.num_fds(), len(process.children(recursive=True)), len(list(proxy(llm)._folder.path.iterdir()))


@pytest.fixture
def llm(two_replicas: LLM) -> Iterator[LLM]:
    """Two workers that are well, and are well again at the end: idle, nothing lost, nothing counted twice."""
    before = two_replicas.stats()
    yield two_replicas
    wait_until(lambda: two_replicas.stats().workers.num_ready == 2, 60.0)
    wait_until_idle(two_replicas)
    after = two_replicas.stats()
    num_ended = sum(after.num_finished.values()) - sum(before.num_finished.values())
    assert num_ended == len(TEXTS), "every request has exactly one end"
    assert after.num_steps >= before.num_steps, "counters never go back"
    assert two_replicas.health().state == "healthy"


def start(llm: LLM, *, streaming: bool = False) -> list[GenerationResult]:
    """All requests, under way on both workers."""
    results = [llm.generate_async(*pair, streaming=streaming) for pair in zip(TEXTS, PARAMS, strict=True)]
    wait_until(lambda: all(replica.jobs for replica in replicas(llm)))
    return results


def proxy(llm: LLM) -> GenerationExecutorProxy:
    executor = llm._executor
    assert isinstance(executor, GenerationExecutorProxy)
    return executor


def replicas(llm: LLM) -> list[Any]:
    return proxy(llm)._replicas


def pid_of(llm: LLM, name: str) -> int:
    pid = next(process.pid for process in llm.health().processes if process.name == name)
    assert pid is not None
    return pid


def check_all(results: list[GenerationResult], expected: list[RequestOutput]) -> None:
    for result, right in zip(results, expected, strict=True):
        output = result.result(60.0)
        assert output.outputs[0].token_ids == right.outputs[0].token_ids
        assert output.outputs[0].text == right.outputs[0].text


def check_streams(results: list[GenerationResult], expected: list[RequestOutput]) -> int:
    """Every stream ends whole, or with `WorkerDiedError` after a part of what was right; returns how many did not."""
    num_broken = 0
    for result, right in zip(results, expected, strict=True):
        text = ""
        try:
            for output in result:
                text += output.outputs[0].text_diff
        except WorkerDiedError as error:
            num_broken += 1
            assert error.remedy == "Try again."
            assert right.outputs[0].text.startswith(text) and len(text) < len(right.outputs[0].text)
        else:
            assert text == right.outputs[0].text
    return num_broken


def test_a_killed_workers_requests_are_run_again(llm: LLM, expected: list[RequestOutput]) -> None:
    before = llm.stats().workers
    results = start(llm)
    os.kill(pid_of(llm, "worker-0"), signal.SIGKILL)
    check_all(results, expected)
    after = llm.stats().workers
    assert after.num_deaths == before.num_deaths + 1
    assert after.num_retries > before.num_retries
    assert sum(result.result(0).metrics.num_preemptions for result in results) == 0


def test_streams_that_began_end_with_a_typed_error(llm: LLM, expected: list[RequestOutput]) -> None:
    results = start(llm, streaming=True)
    seen = [next(result).outputs[0].text for result in results[:8]]
    assert len(seen) == 8
    os.kill(pid_of(llm, "worker-1"), signal.SIGSEGV)
    num_broken = 0
    for result, right, text in zip(results[:8], expected[:8], seen, strict=True):
        try:
            for output in result:
                text += output.outputs[0].text_diff
        except WorkerDiedError as error:
            num_broken += 1
            assert error.http_status == 503
            assert error.code == "worker_died"
            assert right.outputs[0].text.startswith(text)
        else:
            assert text == right.outputs[0].text
    assert 0 < num_broken < 8, "those of one worker only"
    assert check_streams(results[8:], expected[8:]) == 0, "of these nobody had seen anything"


def test_both_workers_die_at_once(llm: LLM, expected: list[RequestOutput]) -> None:
    results = start(llm)
    for name in ("worker-0", "worker-1"):
        os.kill(pid_of(llm, name), signal.SIGKILL)
    wait_until(lambda: llm.health().state == "unhealthy", 2.0)
    with pytest.raises(WorkerDiedError, match="worker-0 is"):
        llm.check_health()
    check_all(results, expected)


def test_nonsense_ends_the_worker_that_gets_it_and_the_one_that_sends_it(
    llm: LLM, expected: list[RequestOutput]
) -> None:
    deaths = llm.stats().workers.num_deaths
    results = start(llm)
    first, second = (replica.process.child for replica in replicas(llm))
    proxy(llm)._coordinator.call(lambda: first.send_encoded(b"\xc1 no message"))
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.linger = 1000
        socket.connect(second._from.address)
        socket.send(b"\xc1 no message")
        wait_until(lambda: llm.stats().workers.num_deaths == deaths + 2)
    check_all(results, expected)


def test_a_short_stop_is_survived(llm: LLM, expected: list[RequestOutput]) -> None:
    before = llm.stats().workers
    results = start(llm)
    pid = pid_of(llm, "worker-0")
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.0)
    os.kill(pid, signal.SIGCONT)
    check_all(results, expected)
    assert llm.stats().workers == before


def test_a_long_stop_is_a_stall(llm: LLM, expected: list[RequestOutput], caplog: pytest.LogCaptureFixture) -> None:
    before = llm.stats().workers
    results = start(llm)
    stopped = time.monotonic()
    os.kill(pid_of(llm, "worker-0"), signal.SIGSTOP)
    wait_until(lambda: llm.health().state == "degraded")
    assert time.monotonic() - stopped < 2.9, "it must be known before the stall is"
    assert llm.health().message in ("worker-0 is silent", "worker-0 is stalled")
    llm.check_health()
    check_all(results, expected)
    after = llm.stats().workers
    assert (after.num_stalls, after.num_deaths) == (before.num_stalls + 1, before.num_deaths + 1)
    assert "worker-0 made no progress for 3 s and is restarted" in caplog.text


def test_abort_does_not_wait_for_a_stopped_worker(llm: LLM) -> None:
    results = start(llm)
    pid = pid_of(llm, "worker-0")
    os.kill(pid, signal.SIGSTOP)
    for result in results:
        result.abort()
    outputs = [result.result(2.5) for result in results]
    os.kill(pid, signal.SIGCONT)
    assert {output.outputs[0].finish_reason for output in outputs} == {"cancelled"}


class TestOneReplica:
    """What happens when there is nowhere else to go."""

    def test_the_queue_waits_for_the_restart_and_then_for_nothing(
        self, model_dir: Path, expected: list[RequestOutput]
    ) -> None:
        config = WorkerConfig(heartbeat_interval=0.1, max_restarts=1)
        with make_llm(model_dir, num_replicas=1, worker_config=config) as llm:
            pid = pid_of(llm, "worker-0")
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: llm.health().state == "unhealthy", 2.0)
            with pytest.raises(WorkerDiedError, match="Try again later"):
                llm.check_health()
            check_all([llm.generate_async(*pair) for pair in zip(TEXTS, PARAMS, strict=True)], expected)
            llm.check_health()
            assert llm.stats().workers.num_restarts == 1
            assert pid_of(llm, "worker-0") != pid
            results = [llm.generate_async(*pair) for pair in zip(TEXTS, PARAMS, strict=True)]
            os.kill(pid_of(llm, "worker-0"), signal.SIGKILL)  # once too often
            for result in results:
                with pytest.raises(WorkerDiedError):
                    result.result(10.0)
            assert llm.health().processes[0].state == "failed"
            for action in (llm.check_health, lambda: llm.generate(TEXTS[0])):
                with pytest.raises(WorkerDiedError, match="No process is left"):
                    action()
            assert llm.stats().workers.num_ready == 0
            assert llm.stats().num_finished["worker_died"] == len(TEXTS)


class TestPostprocessingWorkers:
    """They may die too."""

    def test_requests_are_run_again_or_end_with_an_error(self, model_dir: Path, expected: list[RequestOutput]) -> None:
        with make_llm(model_dir, num_replicas=1, num_postprocess_workers=2, worker_config=QUICK) as llm:
            results = [llm.generate_async(*pair) for pair in zip(TEXTS, PARAMS, strict=True)]
            wait_until(lambda: llm.stats().num_generated_tokens > 50)
            os.kill(pid_of(llm, "postproc-0"), signal.SIGKILL)
            check_all(results, expected)
            assert llm.stats().workers.num_deaths == 1
            assert llm.stats().workers.num_retries > 0
            wait_until(lambda: llm.health().state == "healthy")
            streams = [llm.generate_async(*pair, streaming=True) for pair in zip(TEXTS[:8], PARAMS[:8], strict=True)]
            for stream in streams:
                next(stream)
            os.kill(pid_of(llm, "postproc-1"), signal.SIGKILL)
            errors: list[TokenmillError] = []
            for stream in streams:
                try:
                    stream.result(60.0)
                except WorkerDiedError as error:
                    errors.append(error)
            assert len(errors) == 4, "half of them were there"
            assert "postproc-1" in str(errors[0])
            wait_until(lambda: llm.health().state == "healthy")
            wait_until_idle(llm)
