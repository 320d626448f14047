"""Each check of the soak passes on good data and fails on data that are wrong in one way."""

from __future__ import annotations

import random
from typing import Any

import pytest

from benchmarks.soak_checks import (
    Fault,
    Finding,
    check_answers,
    check_end,
    check_health,
    check_idle,
    check_memory,
    check_recovery,
    check_terminal_events,
    recovery_time,
    restart_time,
    slope_per_minute,
    steady_throughput,
)
from benchmarks.soak_clients import RequestRecord
from benchmarks.soak_watch import Resources, Sample

KILL = Fault("SIGKILL", 100.0, 100.0, pid=7)
STOP = Fault("SIGSTOP", 100.0, 105.0, pid=7)


def record(**fields: Any) -> RequestRecord:
    good: dict[str, Any] = {"kind": "normal", "outcome": "answer", "status": 200, "num_terminal_events": 1}
    return RequestRecord(start_time=0.0, **{**good, **fields})


def kept(findings: list[Finding]) -> dict[str, bool]:
    return {finding.name: finding.is_kept for finding in findings}


def broken(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings if not finding.is_kept]


# ---- requests --------------------------------------------------------------------------------------------------------

GOOD = [
    record(),
    record(outcome="error", code="worker_died"),
    record(outcome="error", status=503, code="worker_died"),
    record(outcome="error", status=429, code="queue_full"),
    record(kind="disconnect", outcome="disconnected", num_terminal_events=0),
    record(kind="malformed", outcome="error", status=400, code="invalid_parameter"),
]


def test_good_requests_pass() -> None:
    assert check_terminal_events(GOOD).is_kept
    assert broken(check_answers(GOOD)) == []


@pytest.mark.parametrize(
    "bad",
    [
        record(outcome="broken", num_terminal_events=0, detail="the stream ended"),
        record(outcome="broken", num_terminal_events=2),
        record(num_terminal_events=2),
        record(num_terminal_events=0),
        record(kind="disconnect", outcome="disconnected", num_terminal_events=1),
        record(kind="malformed", outcome="broken", num_terminal_events=0, detail="ConnectError"),
    ],
)
def test_a_request_without_exactly_one_end_is_found(bad: RequestRecord) -> None:
    finding = check_terminal_events([*GOOD, bad])
    assert (finding.value, finding.is_kept) == (1, False)
    assert finding.details


@pytest.mark.parametrize(
    "bad",
    [
        record(outcome="error", status=500, code="internal_error"),
        record(outcome="error", status=400, code="invalid_parameter"),
        record(outcome="error", status=503, code="executor_shutdown"),
        record(outcome="error", status=500, code="worker_died"),
        record(outcome="error", status=200, code="engine_error"),
        record(outcome="error", status=502, code=None),
        record(kind="disconnect", outcome="error", status=500, code="internal_error"),
    ],
)
def test_an_undocumented_error_is_found(bad: RequestRecord) -> None:
    assert broken(check_answers([*GOOD, bad])) == ["valid requests with undocumented errors"]


@pytest.mark.parametrize("bad", [record(kind="malformed"), record(kind="malformed", outcome="error", status=500)])
def test_a_malformed_request_that_is_not_refused_is_found(bad: RequestRecord) -> None:
    assert broken(check_answers([*GOOD, bad])) == ["malformed requests not refused"]


# ---- what is left ----------------------------------------------------------------------------------------------------


def resources(**changes: Any) -> Resources:
    idle: dict[str, Any] = {
        "num_processes": 2,
        "num_fds": 30,
        "num_threads": 10,
        "shared_memory": frozenset({"other"}),
    }
    return Resources(**{**idle, **changes})


def test_an_idle_server_that_holds_what_it_held_passes() -> None:
    assert broken(check_idle(resources(), resources(), blocks_before=64, blocks_after=64)) == []


@pytest.mark.parametrize(
    ("changes", "blocks", "name"),
    [
        ({}, 63, "cache blocks lost"),
        ({"num_processes": 3}, 64, "processes more than before"),
        ({"num_fds": 40}, 64, "open files more than before"),
        ({"num_threads": 30}, 64, "threads more than before"),
        ({"shared_memory": frozenset({"other", "torch_1"})}, 64, "shared memory segments more than before"),
    ],
)
def test_what_an_idle_server_still_holds_is_found(changes: dict[str, Any], blocks: float, name: str) -> None:
    findings = check_idle(resources(), resources(**changes), blocks_before=64, blocks_after=blocks)
    assert broken(findings) == [name]


def test_what_an_ended_server_leaves_is_found() -> None:
    before = frozenset({"tokenmill-old"})
    assert broken(check_end(frozenset({1, 2}), lambda pid: False, before, before)) == []
    assert broken(check_end(frozenset({1, 2}), lambda pid: pid == 2, before, before)) == [
        "processes left after the end"
    ]
    left = before | {"tokenmill-ipc-x"}
    assert broken(check_end(frozenset({1}), lambda pid: False, before, left)) == [
        "files and segments left after the end"
    ]


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory(server_growth: float = 0.0, total_growth: float = 0.0, *, minutes: float = 4.0) -> list[Sample]:
    """Samples every half second with some noise, growing by so many MiB a minute."""
    noise = random.Random(0)
    samples = []
    for index in range(int(minutes * 120)):
        time = index * 0.5
        samples.append(
            Sample(
                time=time,
                server_rss=100.0 + server_growth * time / 60 + noise.uniform(-0.5, 0.5),
                total_rss=500.0 + total_growth * time / 60 + noise.uniform(-2, 2),
                pids=frozenset({1, 2}),
                worker_pids=(2,),
                health=200,
            )
        )
    return samples


def test_slope_is_that_of_the_line() -> None:
    assert slope_per_minute([0.0, 30.0, 60.0], [5.0, 6.0, 7.0]) == pytest.approx(2.0)
    assert slope_per_minute([1.0], [5.0]) == 0.0


def test_flat_memory_passes_and_growth_is_found() -> None:
    assert broken(check_memory(memory(), [], 0.0)) == []
    assert broken(check_memory(memory(server_growth=2.0), [], 0.0)) == ["growth of the server's resident memory"]
    assert broken(check_memory(memory(total_growth=8.0), [], 0.0)) == ["growth of all processes' resident memory"]


def test_growth_during_the_warm_up_and_while_a_worker_starts_does_not_count() -> None:
    samples = memory()
    grown = [
        Sample(s.time, s.server_rss - 80 if s.time < 30 else s.server_rss, s.total_rss, s.pids, s.worker_pids, 200)
        for s in samples
    ]
    assert broken(check_memory(grown, [], 0.0)) == ["growth of the server's resident memory"]
    assert broken(check_memory(grown, [], 30.0)) == []
    loading = [
        Sample(s.time, s.server_rss, 100.0 if 100 <= s.time < 108 else s.total_rss, s.pids, s.worker_pids, 200)
        for s in samples
    ]
    late_kill = Fault("SIGKILL", 100.0, 100.0, pid=2)
    assert broken(check_memory(loading, [late_kill], 0.0)) == []


# ---- throughput ------------------------------------------------------------------------------------------------------


def tokens(*gaps: tuple[float, float], rate: float = 50.0, end: float = 160.0) -> list[float]:
    """Times of tokens that come `rate` times a second, but not in the gaps."""
    times = [index / rate for index in range(int(end * rate))]
    return [time for time in times if not any(start <= time < stop for start, stop in gaps)]


def test_throughput_without_faults() -> None:
    assert steady_throughput(tokens((100, 104)), [KILL], 0.0, 160.0) == pytest.approx(50.0, rel=0.01)
    assert steady_throughput(tokens(), [KILL], 98.0, 105.0) == 0.0, "no window is far enough from the fault"


@pytest.mark.parametrize(("gap", "expected"), [(0.0, 1.0), (4.0, 4.0), (9.0, 9.0)])
def test_recovery_from_a_kill_is_measured(gap: float, expected: float) -> None:
    times = tokens((100, 100 + gap))
    assert recovery_time(times, KILL, 50.0, 160.0) == pytest.approx(expected, abs=0.7)


def test_tokens_on_their_way_are_no_recovery() -> None:
    assert recovery_time(tokens((100.4, 106)), KILL, 50.0, 160.0) == pytest.approx(6.0, abs=0.7)


def restarts(ready: float = 102.0) -> list[Sample]:
    """Four samples a second around a kill at 100: worker 7, nobody, then worker 8, which is ready at `ready`."""
    samples = []
    for index in range(160 * 4):
        time = index / 4
        pids = (7,) if time < 100 else (8,) if time > 100.5 else ()
        is_ready = time < 100 or time >= ready
        samples.append(Sample(time, 90.0, 900.0, frozenset(pids), pids, 200 if is_ready else 503))
    return samples


@pytest.mark.parametrize("ready", [101.0, 102.5, 104.0])
def test_a_restart_lasts_until_the_next_worker_is_ready(ready: float) -> None:
    assert restart_time(KILL, restarts(ready)) == ready - 100.0


def test_a_dead_worker_that_is_called_healthy_is_no_restart() -> None:
    lies = [Sample(100 + index / 4, 90.0, 900.0, frozenset({7}), (7,), 200) for index in range(200)]
    assert restart_time(KILL, lies) is None


def test_slow_and_missing_recoveries_are_found() -> None:
    slow = ["slowest recovery after a restart"]

    def found(times: list[float], *faults: Fault, ready: float = 102.0) -> list[str]:
        return broken(check_recovery(times, faults, restarts(ready), 0.0, 160.0))

    assert found(tokens((100, 105)), KILL) == []
    assert found(tokens((100, 111)), KILL) == []  # nine seconds after the restart
    assert found(tokens((100, 115)), KILL) == slow
    assert found(tokens((100, 160)), KILL) == slow
    half = [time for index, time in enumerate(tokens()) if time < 100 or index % 2]
    assert found(half, KILL) == slow, "half is not back"
    assert found(tokens((100, 108)), KILL, ready=107.0) == ["slowest restart after SIGKILL"]
    assert found(tokens((100, 112)), KILL, ready=500.0) == ["slowest restart after SIGKILL"]
    assert found(tokens((100, 105)), STOP) == []
    assert found(tokens((100, 120)), STOP) == ["slowest recovery after SIGSTOP"]


def test_a_soak_that_cannot_be_judged_is_not_passed() -> None:
    faults = [Fault("SIGKILL", float(time), float(time), pid=7) for time in range(0, 160, 5)]
    assert broken(check_recovery(tokens(), faults, restarts(), 0.0, 160.0)) == ["windows without faults missing"]


# ---- health ----------------------------------------------------------------------------------------------------------


def health(*unhealthy: tuple[float, float], status: int = 503) -> list[Sample]:
    """What `/health` said four times a second: well, but not in the times given."""
    samples = []
    for index in range(160 * 4):
        time = index / 4
        is_ill = any(start <= time < stop for start, stop in unhealthy)
        workers = (7,) if time < 100.5 else (8,)
        samples.append(Sample(time, 1.0, 1.0, frozenset({1, 7}), workers, status if is_ill else 200))
    return samples


def test_an_honest_server_passes() -> None:
    assert broken(check_health(health((101.5, 105)), [STOP], tokens((100, 105)))) == []
    assert broken(check_health(health((100.5, 106)), [KILL], tokens((100, 106.5)))) == []


def test_a_stopped_or_dead_worker_that_is_called_healthy_is_found() -> None:
    name = "longest claim of health after a fault"
    assert broken(check_health(health(), [STOP], tokens((100, 105)))) == [name]
    assert broken(check_health(health((103, 105)), [STOP], tokens((100, 105)))) == [name]
    assert broken(check_health(health((100.5, 104)), [KILL], tokens((100, 112)))) == [name], "healthy before it is back"
    alone = [Sample(s.time, 1.0, 1.0, s.pids, (7,) if s.time < 104 else (8,), s.health) for s in health()]
    assert broken(check_health(alone, [KILL], tokens((100, 104.5)))) == [name], "there was no process"


def test_health_without_an_answer_is_found() -> None:
    findings = check_health(health((50, 51), status=0), [], tokens())
    assert broken(findings) == ["health requests without a proper answer"]
    assert kept(findings)["longest claim of health after a fault"]
