"""`SupervisedProcess` with a fake process: versions, stalls, silence, waits between restarts, giving up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tokenmill.config import WorkerConfig
from tokenmill.errors import EngineStalledError, InvalidParameterError, ProtocolError, WorkerDiedError, WorkerStartError
from tokenmill.executor import supervised
from tokenmill.executor.ipc import IpcFolder
from tokenmill.executor.messages import PROTOCOL_VERSION, Heartbeat, Hello, LogRecord, Ready, Shutdown, StartFailed
from tokenmill.executor.supervised import SupervisedProcess
from tokenmill.telemetry.stats import EngineStats

pytestmark = [pytest.mark.spec("B2"), pytest.mark.spec("F2")]


class FakeChild:
    """A process that does what a test says."""

    def __init__(self, *arguments: Any) -> None:
        self.pid = 4242
        self.exit_code: int | None = None
        self.sent: list[Any] = []
        self.is_closed = False

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def dump_stacks(self, timeout: float) -> str:
        return "Thread 0x1: in step()"

    def log_tail(self) -> str:
        return "its last words"

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[SupervisedProcess]:
    monkeypatch.setattr(supervised, "ChildProcess", FakeChild)
    config = WorkerConfig(
        stall_timeout=30.0, start_timeout=60.0, restart_backoff=1.0, restart_backoff_cap=5.0, max_restarts=4,
        restart_window=1000.0,
    )  # fmt: skip
    folder = IpcFolder()
    yield SupervisedProcess("worker", 3, config, folder, None, Shutdown)  # type: ignore[arg-type]
    folder.close()


def child_of(process: SupervisedProcess) -> Any:
    return process.child


def make_ready(process: SupervisedProcess, now: float) -> None:
    process.on_message(Hello(PROTOCOL_VERSION, 1), now)
    process.on_message(Ready(None), now)


def test_a_good_start(process: SupervisedProcess) -> None:
    process.start(10.0)
    assert process.state == "starting"
    process.send(Shutdown())
    assert child_of(process).sent == [], "nothing but the start is sent before it is ready"
    process.on_message(Hello(PROTOCOL_VERSION, 1), 11.0)
    assert child_of(process).sent == [Shutdown()]
    process.on_message(Ready(None), 12.0)
    assert process.state == "ready"
    assert process.check(13.0) is None
    health = process.health(14.0, 0.5, EngineStats())
    assert (health.name, health.pid, health.heartbeat_age, health.last_step_age) == ("worker-3", 4242, 2.0, 0.5)


def test_another_version_is_refused(process: SupervisedProcess) -> None:
    process.start(0.0)
    with pytest.raises(ProtocolError, match=rf"version {PROTOCOL_VERSION + 1} .*not {PROTOCOL_VERSION}\."):
        process.on_message(Hello(PROTOCOL_VERSION + 1, 1), 0.0)


def test_ends_while_it_starts(process: SupervisedProcess) -> None:
    process.start(0.0)
    assert process.check(59.0) is None
    assert isinstance(process.check(61.0), WorkerStartError)
    child_of(process).exit_code = -9
    assert "ended by signal 9 while it started" in str(process.check(1.0))
    error = InvalidParameterError("No.", field="model")
    process.on_message(StartFailed(error), 1.0)
    assert process.check(1.0) is error


def test_silence_and_stalls(process: SupervisedProcess, caplog: pytest.LogCaptureFixture) -> None:
    process.start(0.0)
    make_ready(process, 0.0)
    assert process.check(2.5) is None
    assert process.state == "silent"
    process.on_message(Heartbeat(has_work=True), 3.0)
    process.progressed(3.0)
    assert process.check(3.0) is None
    assert process.state == "ready"
    for now in range(4, 31):  # it lives, has work, and does not get on
        process.on_message(Heartbeat(has_work=True), float(now))
        assert process.check(float(now)) is None
    assert process.state == "stalled"
    process.send(Shutdown())
    assert child_of(process).sent[-1:] == [Shutdown()] and len(child_of(process).sent) == 2, "it may still listen"
    process.on_message(Heartbeat(has_work=True), 34.0)
    assert isinstance(process.check(34.0), EngineStalledError)
    assert "Thread 0x1: in step()" in caplog.text
    process.progressed(31.0)
    process.on_message(Heartbeat(has_work=True), 60.0)
    assert process.check(60.0) is None
    assert process.num_stalls == 1


def test_waits_grow_to_a_cap_and_a_stable_life_resets_them(process: SupervisedProcess) -> None:
    process.start(0.0)
    now = 0.0
    waits = []
    for lifetime in (1.0, 1.0, 1.0, 100.0):
        make_ready(process, now)
        now += lifetime
        process.bury(WorkerDiedError("It died."), now, may_restart=True)
        assert process.state == "waiting_to_restart"
        died = now
        while process.state == "waiting_to_restart":
            process.restart_if_due(now)
            now += 0.25
        waits.append(now - 0.25 - died)
    assert waits == [0.0, 1.0, 2.0, 0.0]
    assert (process.num_deaths, process.num_restarts) == (4, 4)
    make_ready(process, now)
    process.bury(WorkerDiedError("It died."), now, may_restart=True)
    assert process.state == "failed", "the fifth time within the window"
    process.restart_if_due(now + 10_000.0)
    assert process.state == "failed"


def test_a_system_that_refuses_new_processes_is_not_asked_for_ever(
    process: SupervisedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.start(0.0)
    process.bury(WorkerDiedError("It died."), 0.0, may_restart=True)

    def refuse(*arguments: Any) -> None:
        raise WorkerStartError("No more processes.")

    monkeypatch.setattr(supervised, "ChildProcess", refuse)
    now, attempts = 0.0, []
    while process.state != "failed":
        before = process.num_restarts
        process.restart_if_due(now)
        if process.num_restarts > before:
            attempts.append(now)
        now += 0.25
    assert attempts == [0.0, 1.0, 3.0, 7.0]
    assert "No more processes" in str(process.last_death)


def test_old_deaths_are_forgiven(process: SupervisedProcess) -> None:
    process.start(0.0)
    for index in range(20):
        now = index * 300.0
        make_ready(process, now)
        process.bury(WorkerDiedError("It died."), now + 200.0, may_restart=True)
        assert process.state == "waiting_to_restart"
        process.restart_if_due(now + 200.0)
    assert process.num_restarts == 20


def test_nothing_is_restarted_after_the_end(process: SupervisedProcess, caplog: pytest.LogCaptureFixture) -> None:
    process.start(0.0)
    make_ready(process, 0.0)
    child = child_of(process)
    child.exit_code = 1
    error = process.check(1.0)
    assert isinstance(error, WorkerDiedError)
    process.bury(error, 1.0, may_restart=False)
    assert process.state == "stopped"
    assert child.is_closed
    assert "its last words" in caplog.text
    process.restart_if_due(1000.0)
    assert process.child is None
    assert process.last_death is error


def test_what_a_process_logs_is_logged_here(process: SupervisedProcess, caplog: pytest.LogCaptureFixture) -> None:
    process.start(0.0)
    process.on_message(LogRecord(30, "tokenmill.x", "worker-3: 100 % strange"), 0.0)
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("tokenmill.x", "WARNING", "worker-3: 100 % strange")
    ]
