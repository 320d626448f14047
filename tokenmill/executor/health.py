"""`ExecutorHealth`: what an executor knows about its engines, for probes and for people. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

HealthState: TypeAlias = Literal["healthy", "degraded", "unhealthy"]
"""All engines can run requests, some can, none can."""

ProcessState: TypeAlias = Literal["starting", "ready", "silent", "waiting_to_restart", "failed", "stopped"]
"""`silent`: alive, but it has not been heard for a while. `failed`: given up after too many restarts."""


@dataclass(frozen=True, slots=True)
class ProcessHealth:
    """One engine: a worker process, a postprocessing worker, or the engine in the caller's process.

    Args:
        name: `worker-0`, `postproc-1`, or `engine` in the caller's process.
        state: see `ProcessState`.
        pid: process id; None when there is none now.
        heartbeat_age: seconds since it was last heard.
        last_step_age: seconds since its engine's last step; None before the first, and without an engine.
        has_work: whether requests are under way in it.
        num_restarts: times it was started again.
    """

    name: str
    state: ProcessState
    pid: int | None
    heartbeat_age: float
    last_step_age: float | None
    has_work: bool
    num_restarts: int = 0


@dataclass(frozen=True, slots=True)
class ExecutorHealth:
    """An executor at one moment.

    Args:
        state: see `HealthState`.
        message: what is wrong; empty when nothing is.
        processes: its engines and postprocessing workers.
    """

    state: HealthState
    message: str
    processes: tuple[ProcessHealth, ...]
