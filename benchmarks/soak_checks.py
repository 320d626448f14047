"""What a soak must show, as pure functions of what was recorded. Each can fail: `tests/benchmarks/test_soak_checks.py`.

`Finding` is a number beside the limit that it has to keep, and what to look at when it does not.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from benchmarks.soak_clients import RequestRecord
from benchmarks.soak_watch import Resources, Sample

RECOVERY_LIMIT = 10.0
"""Seconds after a restart, or after a stop, within which throughput has to be back."""
RESTART_LIMIT = 5.0
"""Seconds from a kill until the next worker is ready."""
RECOVERED_SHARE = 0.8
"""Share of the throughput without faults that counts as recovered."""
WINDOW = 3.0
"""Seconds over which throughput is averaged."""
UNHEALTHY_AFTER = 2.0
"""Seconds after which a dead or stopped worker must not be reported healthy any more."""
FIRST_STEP_SECONDS = 5.0
"""Time that a new worker may need for its first step, a long prefill, between being ready and its first token."""
SERVER_SLOPE_LIMIT = 1.0
TOTAL_SLOPE_LIMIT = 5.0
"""MiB a minute that resident memory may grow by, of the server's own process and of all its processes."""
SPARE_FDS = 2
"""Files that an idle server may have open more than before: connections that are about to be closed."""
SPARE_THREADS = 4
"""Threads that an idle server may have more than before: those of its pool are started when they are needed."""
DOCUMENTED_CODES = {
    404: {"model_not_found"},
    429: {"queue_full"},
    503: {"worker_died", "engine_stalled", "out_of_memory"},
    504: {"request_timeout"},
}
"""Errors that a valid request may meet while workers are killed, by HTTP status; in a stream the code counts."""

FaultKind: TypeAlias = Literal["SIGKILL", "SIGSTOP"]


@dataclass(frozen=True)
class Fault:
    """What was done to a worker.

    Args:
        kind: the signal.
        time: when, seconds of `time.monotonic`.
        end_time: when it was over: SIGCONT; the same as `time` for SIGKILL.
        pid: of the worker.
    """

    kind: FaultKind
    time: float
    end_time: float
    pid: int


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Args:
        name, value, unit: what was found.
        limit: the most that the value may be; None: it is only reported.
        details: examples of what was wrong.
    """

    name: str
    value: float
    unit: str
    limit: float | None = 0.0
    details: tuple[str, ...] = ()

    @property
    def is_kept(self) -> bool:
        """Whether the limit was kept."""
        return self.limit is None or self.value <= self.limit


def check_terminal_events(records: Sequence[RequestRecord]) -> Finding:
    """Every request ends once: with an answer, with an error, or because its client left."""
    wrong = []
    for record in records:
        expected = 0 if record.outcome == "disconnected" else 1
        if record.outcome == "broken" or record.num_terminal_events != expected:
            wrong.append(f"{record.kind} {record.outcome}, {record.num_terminal_events} ends: {record.detail[:300]}")
    return Finding("requests without exactly one end", len(wrong), "requests", details=_examples(wrong))


def check_answers(records: Sequence[RequestRecord]) -> list[Finding]:
    """Malformed requests are refused, valid ones only with documented errors."""
    undocumented, not_refused = [], []
    for record in records:
        text = f"{record.kind}: {record.outcome} {record.status} {record.code}: {record.detail[:300]}"
        if record.kind == "malformed":
            if record.outcome == "answer" or (record.outcome == "error" and not 400 <= record.status < 500):
                not_refused.append(text)
        elif record.outcome == "error" and not _is_documented(record):
            undocumented.append(text)
    return [
        Finding(
            "valid requests with undocumented errors", len(undocumented), "requests", details=_examples(undocumented)
        ),
        Finding("malformed requests not refused", len(not_refused), "requests", details=_examples(not_refused)),
    ]


def _is_documented(record: RequestRecord) -> bool:
    if record.status == 200:  # the error is an event of the stream
        return any(record.code in codes for codes in DOCUMENTED_CODES.values())
    return record.code in DOCUMENTED_CODES.get(record.status, ())


def check_idle(before: Resources, after: Resources, *, blocks_before: float, blocks_after: float) -> list[Finding]:
    """An idle server holds what it held before the soak.

    Args:
        before, after: its resources.
        blocks_before, blocks_after: free cache blocks.
    """
    segments = sorted(after.shared_memory - before.shared_memory)
    return [
        Finding("cache blocks lost", abs(blocks_before - blocks_after), "blocks"),
        Finding("processes more than before", after.num_processes - before.num_processes, "processes"),
        Finding("open files more than before", after.num_fds - before.num_fds, "files", SPARE_FDS),
        Finding("threads more than before", after.num_threads - before.num_threads, "threads", SPARE_THREADS),
        Finding("shared memory segments more than before", len(segments), "segments", details=_examples(segments)),
    ]


def check_end(
    seen_pids: frozenset[int], is_alive: Callable[[int], bool], before: frozenset[str], after: frozenset[str]
) -> list[Finding]:
    """A server that has ended leaves nothing.

    Args:
        seen_pids: all processes that it ever had.
        is_alive: whether a process still exists.
        before, after: names in shared memory and of temporary files, before it was started and after its end.
    """
    alive = [str(pid) for pid in sorted(seen_pids) if is_alive(pid)]
    left = sorted(after - before)
    return [
        Finding("processes left after the end", len(alive), "processes", details=_examples(alive)),
        Finding("files and segments left after the end", len(left), "entries", details=_examples(left)),
    ]


# ---- memory ----------------------------------------------------------------------------------------------------------


def slope_per_minute(times: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the line through the points by least squares, in units a minute; 0 for fewer than two points.

    Args:
        times: seconds.
    """
    if len(times) < 2:
        return 0.0
    return statistics.linear_regression(times, values).slope * 60.0


def check_memory(samples: Sequence[Sample], faults: Sequence[Fault], warm_up_end: float) -> list[Finding]:
    """Resident memory is flat after the warm-up.

    The total is looked at while all workers live and none is young: a worker that loads its model grows.
    """
    warm = [sample for sample in samples if sample.time >= warm_up_end]
    num_processes = max((len(sample.pids) for sample in warm), default=0)
    kills = [fault.time for fault in faults if fault.kind == "SIGKILL"]
    settled = [
        sample
        for sample in warm
        if len(sample.pids) == num_processes and not any(0 <= sample.time - kill < RECOVERY_LIMIT for kill in kills)
    ]
    server = slope_per_minute([sample.time for sample in warm], [sample.server_rss for sample in warm])
    total = slope_per_minute([sample.time for sample in settled], [sample.total_rss for sample in settled])
    minutes = (warm[-1].time - warm[0].time) / 60.0 if warm else 0.0
    return [
        Finding("growth of the server's resident memory", server, "MiB/min", SERVER_SLOPE_LIMIT),
        Finding("growth of all processes' resident memory", total, "MiB/min", TOTAL_SLOPE_LIMIT),
        Finding("time over which growth was measured", minutes, "min", None),
        Finding("most resident memory of all processes", max(s.total_rss for s in samples), "MiB", None),
    ]


# ---- throughput and health -------------------------------------------------------------------------------------------


def steady_throughput(token_times: Sequence[float], faults: Sequence[Fault], start: float, end: float) -> float:
    """Tokens a second without faults: the median over windows that no fault is near.

    Args:
        token_times: when tokens came, ascending.
        start, end: of the soak, after its warm-up.
    """
    rates = []
    time = start
    while time + WINDOW <= end:
        is_quiet = all(time + WINDOW <= fault.time or time >= fault.end_time + RECOVERY_LIMIT for fault in faults)
        if is_quiet:
            rates.append(_rate(token_times, time))
        time += 0.5
    return statistics.median(rates) if rates else 0.0


def recovery_time(token_times: Sequence[float], fault: Fault, steady: float, end: float) -> float | None:
    """Seconds after the end of a fault from which on throughput was back for `WINDOW` seconds; None: it never was.

    Args:
        token_times: when tokens came, ascending.
        steady: throughput without faults.
        end: of what was recorded.
    """
    time = fault.end_time
    if fault.kind == "SIGKILL":  # tokens that were on their way when the worker died are not its successor's
        time = _first_after(token_times, fault.time + 1.0, end)
    while time + WINDOW <= end:
        if _rate(token_times, time) >= RECOVERED_SHARE * steady:
            return time - fault.end_time
        time += 0.25
    return None


def restart_time(fault: Fault, samples: Sequence[Sample]) -> float | None:
    """Seconds from a SIGKILL until another worker was there and reported ready; None: there never was one."""
    for sample in samples:
        is_another = any(pid != fault.pid for pid in sample.worker_pids)
        if sample.time > fault.time and is_another and sample.health == 200:
            return sample.time - fault.time
    return None


def check_recovery(
    token_times: Sequence[float], faults: Sequence[Fault], samples: Sequence[Sample], start: float, end: float
) -> list[Finding]:
    """A killed worker is replaced soon, and throughput is back soon after each restart and each stop.

    A fault so late that it cannot be judged is left out.
    """
    steady = steady_throughput(token_times, faults, start, end)
    if not steady:
        return [Finding("windows without faults missing", 1, "", details=("faults were too close to each other",))]
    findings = [Finding("throughput without faults", steady, "tokens/s", None)]
    judged = [fault for fault in faults if end - fault.end_time >= RECOVERY_LIMIT + WINDOW]
    times = {fault: _or_never(recovery_time(token_times, fault, steady, end)) for fault in judged}
    kills = [fault for fault in judged if fault.kind == "SIGKILL"]
    stops = [fault for fault in judged if fault.kind == "SIGSTOP"]
    if kills:
        restarts = {fault: _or_never(restart_time(fault, samples)) for fault in kills}
        after_restart = max(times[fault] - min(restarts[fault], times[fault]) for fault in kills)
        findings += [
            Finding("slowest restart after SIGKILL", max(restarts.values()), "s", RESTART_LIMIT),
            Finding("slowest recovery after a restart", after_restart, "s", RECOVERY_LIMIT),
            Finding(
                "slowest recovery after SIGKILL, restart included", max(times[fault] for fault in kills), "s", None
            ),
            Finding("faults judged: SIGKILL", len(kills), "", None),
        ]
    if stops:
        slowest = max(times[fault] for fault in stops)
        findings.append(Finding("slowest recovery after SIGSTOP", slowest, "s", RECOVERY_LIMIT))
        findings.append(Finding("faults judged: SIGSTOP", len(stops), "", None))
    return findings


def _or_never(seconds: float | None) -> float:
    return float("inf") if seconds is None else seconds


def check_health(samples: Sequence[Sample], faults: Sequence[Fault], token_times: Sequence[float]) -> list[Finding]:
    """A stopped or dead worker is not reported healthy for long. For servers with one worker.

    A worker counts as stopped until it goes on, and as dead while no other process is there or the first token is far.
    """
    lies: list[str] = []
    longest = 0.0
    for fault in faults:
        first_token = _first_after(token_times, fault.time + 1.0, fault.time + 60.0)
        claims = []
        for sample in samples:
            if fault.kind == "SIGSTOP":
                is_down = fault.time < sample.time < fault.end_time
            else:
                is_alone = all(pid == fault.pid for pid in sample.worker_pids)
                is_down = fault.time < sample.time < first_token - (0.0 if is_alone else FIRST_STEP_SECONDS)
            if is_down and sample.health == 200:
                claims.append(sample.time - fault.time)
        longest = max([longest, *claims])
        late = [age for age in claims if age > UNHEALTHY_AFTER]
        lies += [f"healthy {age:.1f} s after {fault.kind} of process {fault.pid}" for age in late[-1:]]
    silent = sum(sample.health not in (200, 503) for sample in samples)
    return [
        Finding("longest claim of health after a fault", longest, "s", UNHEALTHY_AFTER, _examples(lies)),
        Finding("health requests without a proper answer", silent, "requests"),
    ]


def describe(records: Sequence[RequestRecord]) -> list[Finding]:
    """How many requests there were, by what became of them."""
    outcomes = Counter(
        f"{record.kind}: {record.outcome}" + (f" {record.code}" if record.kind != "malformed" and record.code else "")
        for record in records
    )
    return [Finding(name, count, "requests", None) for name, count in sorted(outcomes.items())]


def _rate(token_times: Sequence[float], time: float) -> float:
    return (bisect_left(token_times, time + WINDOW) - bisect_left(token_times, time)) / WINDOW


def _first_after(token_times: Sequence[float], time: float, otherwise: float) -> float:
    index = bisect_left(token_times, time)
    return token_times[index] if index < len(token_times) else otherwise


def _examples(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(texts[:5])
