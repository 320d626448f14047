"""Watches a server from outside while a soak runs: its processes, their memory, files and threads, and its health.

`Watcher.run` takes a `Sample` several times a second; `Resources` is a closer look, for before and after.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

INTERVAL = 0.25
WORKER_ARGUMENTS = ("-m", "tokenmill.executor", "worker")


@dataclass(frozen=True)
class Sample:
    """The server at one moment.

    Args:
        time: seconds of `time.monotonic`.
        server_rss, total_rss: resident memory of the server's process, and of all its processes, in MiB.
        pids: of all its processes.
        worker_pids: of those that run engines.
        health: status of `/health`; 0 if it did not answer.
    """

    time: float
    server_rss: float
    total_rss: float
    pids: frozenset[int]
    worker_pids: tuple[int, ...]
    health: int


@dataclass(frozen=True)
class Resources:
    """What a server holds when it is idle.

    Args:
        num_processes: its own and its children.
        num_fds: open files of the server's process.
        num_threads: of the server's process.
        shared_memory: entries of `/dev/shm`.
    """

    num_processes: int
    num_fds: int
    num_threads: int
    shared_memory: frozenset[str]


def read_resources(pid: int) -> Resources:
    """Of the server whose process is `pid`."""
    server = psutil.Process(pid)
    return Resources(
        num_processes=1 + len(server.children(recursive=True)),
        num_fds=server.num_fds(),
        num_threads=server.num_threads(),
        shared_memory=shared_memory(),
    )


def shared_memory() -> frozenset[str]:
    """Names of shared memory segments; none where the system has no `/dev/shm`."""
    folder = Path("/dev/shm")
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()  # noqa: PTH208


def worker_processes(pid: int) -> list[psutil.Process]:
    """Processes below `pid` that run engines, oldest first."""
    workers = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            arguments = process.cmdline()
        except psutil.Error:  # it has ended meanwhile
            continue
        if all(argument in arguments for argument in WORKER_ARGUMENTS):
            workers.append(process)
    return sorted(workers, key=lambda process: process.create_time())


@dataclass
class Watcher:
    """Samples of one server.

    Args:
        url: of the server.
        pid: of its process.
        samples: taken so far.
    """

    url: str
    pid: int
    samples: list[Sample] = field(default_factory=list)

    @property
    def seen_pids(self) -> frozenset[int]:
        """Every process that the server ever had."""
        return frozenset().union(*(sample.pids for sample in self.samples))

    async def run(self, stop: asyncio.Event) -> None:
        """Take samples until `stop`."""
        async with httpx.AsyncClient(base_url=self.url, timeout=5.0) as http:
            while not stop.is_set():
                started = time.monotonic()
                self.samples.append(await self._take(http))
                await asyncio.sleep(max(0.0, INTERVAL - (time.monotonic() - started)))

    async def _take(self, http: httpx.AsyncClient) -> Sample:
        try:
            health = (await http.get("/health")).status_code
        except httpx.HTTPError:
            health = 0
        server = psutil.Process(self.pid)
        processes = [server, *server.children(recursive=True)]
        memory = {process.pid: _resident_mib(process) for process in processes}
        return Sample(
            time=time.monotonic(),
            server_rss=memory[self.pid],
            total_rss=sum(memory.values()),
            pids=frozenset(memory),
            worker_pids=tuple(process.pid for process in worker_processes(self.pid)),
            health=health,
        )


def _resident_mib(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 2**20
    except psutil.Error:  # it has ended meanwhile
        return 0.0
