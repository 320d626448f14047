"""Does a server survive what users and machines do to it? Minutes of load with faults, then a look at what is left.

    python -m benchmarks.soak
    python -m benchmarks.soak --model tiny --minutes 0.5 --kill-every 8 --output /tmp/soak.json

Starts `tokenmill serve` with worker processes. Clients send requests of mixed lengths; one in five leaves early, one in
twenty sends nonsense. Every half minute a worker is killed (SIGKILL), twice one is stopped for five seconds. In the end
every request must have ended exactly once, throughput must have come back after each fault, memory must not have grown,
and nothing may be left: no cache block, process, open file, shared memory or temporary file. Needs the extra `fuzz`.
Writes `results/soak.json`, and fails if a limit was not kept (`soak_checks.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import tempfile
import time
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from benchmarks.result_file import RESULTS, Row, write_result
from benchmarks.server_process import ServerProcess, running_server, stop
from benchmarks.soak_checks import (
    RECOVERY_LIMIT,
    WINDOW,
    Fault,
    FaultKind,
    Finding,
    check_answers,
    check_end,
    check_health,
    check_idle,
    check_memory,
    check_recovery,
    check_terminal_events,
    describe,
)
from benchmarks.soak_clients import Load, RequestRecord, run_clients
from benchmarks.soak_watch import (
    Resources,
    Watcher,
    read_resources,
    shared_memory,
    worker_processes,
)
from tests.support.tiny_checkpoint import write_tiny_model

STOP_SECONDS = 5.0
NUM_STOPS = 2
KNOWN_BODY = {"prompt": "The sky is", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


@dataclass
class Soak:
    """Everything that was recorded.

    Args:
        records: requests.
        watcher: samples of the server.
        faults: what was done to it.
        start, end: of the load, seconds of `time.monotonic`.
    """

    watcher: Watcher
    records: list[RequestRecord] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    start: float = 0.0
    end: float = 0.0


def main() -> None:
    """Run, check, print, write."""
    options = parse_arguments()
    before = shared_memory()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        model = write_tiny_model(folder / "model") if options.model == "tiny" else options.model
        config = write_config(folder / "server.yaml", options)
        temporary = folder / "tmp"
        temporary.mkdir()
        arguments = ["--served-model-name", "soak", "--config", str(config)]
        with running_server(model, arguments, folder / "log", temporary) as server:
            soak, findings = drive(server, options)
            shutdown_seconds = stop(server.process)
        left = shared_memory() | {path.name for path in temporary.iterdir()}
        log = (folder / "log").read_text(errors="replace")
    findings += check_end(soak.watcher.seen_pids, psutil.pid_exists, before, left)
    if options.samples is not None:
        write_samples(options.samples, soak)
    findings.append(Finding("time that the server took to end", shutdown_seconds, "s", None))
    report(options, findings, log)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Load a server and break it.")
    parser.add_argument("--model", default="smollm2:135m", help="name or file; tiny: a random model of 200 KiB")
    parser.add_argument("--minutes", type=float, default=10.0, help="of load")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--replicas", type=int, default=1, help="worker processes")
    parser.add_argument("--postprocess-workers", type=int, default=0)
    parser.add_argument("--kill-every", type=float, default=30.0, help="seconds between two SIGKILLs; 0: none")
    parser.add_argument("--no-stops", action="store_true", help="send no SIGSTOP")
    parser.add_argument("--warm-up", type=float, default=20.0, help="seconds of load before the first fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "soak.json")
    parser.add_argument("--log", type=Path, help="keep the server's log here")
    parser.add_argument("--samples", type=Path, help="write memory, health and tokens over time here, as CSV")
    return parser.parse_args(arguments)


def write_config(path: Path, options: argparse.Namespace) -> Path:
    """The server's configuration: workers may die as often as they are killed here."""
    num_kills = options.minutes * 60 / options.kill_every if options.kill_every else 0
    config = {
        "num_replicas": options.replicas,
        "num_postprocess_workers": options.postprocess_workers,
        "max_seq_len": 1024,
        **({"num_threads": 1} if options.model == "tiny" else {}),
        "kv_cache_config": {"max_tokens": 32768},
        "worker_config": {"max_restarts": int(num_kills) + 5, "restart_backoff": 0.1, "restart_backoff_cap": 1.0},
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


# ---- the run ---------------------------------------------------------------------------------------------------------


def drive(server: ServerProcess, options: argparse.Namespace) -> tuple[Soak, list[Finding]]:
    """Load the server, break it, let it rest; returns what was recorded and what was found."""
    known = server.post("/v1/completions", KNOWN_BODY)
    warm_connections(server)
    before, blocks_before = at_rest(server)
    soak = Soak(Watcher(server.url, server.process.pid))
    asyncio.run(run_load(soak, options))
    is_idle = server.wait_until_idle(60.0)
    after, blocks_after = at_rest(server)
    end_status, end_body = server.post("/v1/completions", KNOWN_BODY)
    is_right = (end_status, _text(end_body)) == (known[0], _text(known[1])) and end_status == 200
    token_times = sorted(time for record in soak.records for time in record.token_times)
    warm_up_end = soak.start + options.warm_up
    findings = [
        *describe(soak.records),
        check_terminal_events(soak.records),
        *check_answers(soak.records),
        Finding("still busy a minute after the last request", float(not is_idle), ""),
        Finding("known request answered wrongly afterwards", float(not is_right), "", details=(end_body[:300],)),
        *check_idle(before, after, blocks_before=blocks_before, blocks_after=blocks_after),
        *check_memory(soak.watcher.samples, soak.faults, warm_up_end),
        *check_recovery(token_times, soak.faults, soak.watcher.samples, warm_up_end, soak.end),
        Finding("worker restarts that the server counted", server.metric("worker_restarts_total"), "", None),
        Finding("requests that the server ran again", server.metric("request_retries_total"), "", None),
    ]
    num_kills = sum(fault.kind == "SIGKILL" for fault in soak.faults)
    uncounted = abs(num_kills - server.metric("worker_restarts_total"))
    findings.append(Finding("restarts that do not belong to a kill", uncounted, ""))
    if options.replicas == 1:
        findings += check_health(soak.watcher.samples, soak.faults, token_times)
    return soak, findings


def warm_connections(server: ServerProcess) -> None:
    """Use what the server makes on first use: its thread pool, its tokenizer, its metrics."""
    for _ in range(50):
        server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    server.get("/metrics")
    server.get("/health/generate")


def at_rest(server: ServerProcess) -> tuple[Resources, float]:
    """Resources and free blocks of the idle server; connections get a moment to close."""
    server.wait_until_idle()
    time.sleep(2.0)
    return read_resources(server.process.pid), server.metric("kv_cache_free_blocks")


async def run_load(soak: Soak, options: argparse.Namespace) -> None:
    """Clients, faults and watcher at the same time, for the minutes asked for."""
    stop_clients, stop_watcher = asyncio.Event(), asyncio.Event()
    soak.start = time.monotonic()
    watching = asyncio.create_task(soak.watcher.run(stop_watcher))
    load = Load(num_clients=options.clients)
    clients = asyncio.create_task(run_clients(soak.watcher.url, load, stop_clients, soak.records, options.seed))
    faults = asyncio.create_task(cause_faults(soak, options))
    done, _ = await asyncio.wait({faults, clients}, timeout=options.minutes * 60, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()  # an error in the soak itself ends it
    soak.end = time.monotonic()
    faults.cancel()
    stop_clients.set()
    await clients
    stop_watcher.set()
    await watching
    with suppress(asyncio.CancelledError):
        await faults


async def cause_faults(soak: Soak, options: argparse.Namespace) -> None:
    """Kill and stop workers at their times, until the time for the last recovery begins."""
    choose = random.Random(options.seed)
    for due, kind in plan_faults(options):
        await asyncio.sleep(max(0.0, soak.start + due - time.monotonic()))
        workers = worker_processes(soak.watcher.pid)
        if not workers:
            continue  # it has not come back from the last fault, which is found without another one
        worker = choose.choice(workers)
        started = time.monotonic()
        if kind == "SIGKILL":
            worker.send_signal(signal.SIGKILL)
        else:
            worker.send_signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(STOP_SECONDS)
            finally:
                worker.send_signal(signal.SIGCONT)
        soak.faults.append(Fault(kind, started, started if kind == "SIGKILL" else time.monotonic(), worker.pid))


def plan_faults(options: argparse.Namespace) -> list[tuple[float, FaultKind]]:
    """Seconds from the start and kind of each fault, in order. Stops come in the middle between two kills."""
    total = options.minutes * 60
    last = total - RECOVERY_LIMIT - WINDOW - STOP_SECONDS
    plan: list[tuple[float, FaultKind]] = []
    if options.kill_every:
        due = options.warm_up
        while due <= last:
            plan.append((due, "SIGKILL"))
            due += options.kill_every
    if not options.no_stops:
        kills = [due for due, _ in plan]
        for number in range(NUM_STOPS):
            wanted = options.warm_up + (last - options.warm_up) * (number + 1) / (NUM_STOPS + 1)
            before = max((due for due in kills if due <= wanted), default=wanted)
            plan.append((before + options.kill_every / 2 if before in kills else wanted, "SIGSTOP"))
    return sorted((due, kind) for due, kind in plan if due <= last)


def _text(body: str) -> str:
    """The choices of an answer, without what differs each time."""
    return body.partition('"choices"')[2].partition('"usage"')[0]


# ---- the report ------------------------------------------------------------------------------------------------------


def write_samples(path: Path, soak: Soak) -> None:
    """What happened over time, a line each quarter of a second: to look at what a limit was broken by."""
    tokens = sorted(time for record in soak.records for time in record.token_times)
    lines = ["seconds,server_mib,total_mib,num_processes,health,tokens_before"]
    for sample in soak.watcher.samples:
        seconds = f"{sample.time - soak.start:.2f}"
        memory = f"{sample.server_rss:.1f},{sample.total_rss:.1f}"
        lines.append(f"{seconds},{memory},{len(sample.pids)},{sample.health},{bisect_left(tokens, sample.time)}")
    lines += [
        f"# {fault.kind} at {fault.time - soak.start:.2f}, over at {fault.end_time - soak.start:.2f}"
        for fault in soak.faults
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def report(options: argparse.Namespace, findings: Sequence[Finding], log: str) -> None:
    """Print and write; exits with 1 if a limit was not kept."""
    work = f"{options.minutes:g} min, {options.clients} clients, {options.replicas} workers, {options.model}"
    for finding in findings:
        verdict = (
            "" if finding.limit is None else f"limit {finding.limit:g} " + ("kept" if finding.is_kept else "BROKEN")
        )
        print(f"{finding.name:50} {finding.value:12,.2f} {finding.unit:10} {verdict}")
        if not finding.is_kept:
            for detail in finding.details:
                print(f"    {detail}")
    rows = [Row(work, one.name, min(one.value, 1e9), one.unit, goal=one.limit) for one in findings]
    write_result(options.output, "soak", rows)
    if options.log is not None:
        options.log.write_text(log, encoding="utf-8")
    print(f"written to {options.output}")
    if not all(finding.is_kept for finding in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
