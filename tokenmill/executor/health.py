"""`ExecutorHealth`: what an executor knows about its engines, for probes and for people. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from tokenmill.telemetry.stats import EngineStats

HealthState: TypeAlias = Literal["healthy", "degraded", "unhealthy"]
"""All engines can run requests, some can, none can."""

ProcessState: TypeAlias = Literal["starting", "ready", "silent", "stalled", "waiting_to_restart", "failed", "stopped"]
"""`silent`: alive, but it has not been heard for a while. `stalled`: it is heard, but its engine finishes no step.
`failed`: given up after too many restarts."""

STALLED_SECONDS: Final = 1.5
"""An engine with work that finishes no step for so long is not counted on, unless its steps are known to be long."""
_LONGEST_STEPS: Final = 2.0
_FORGETTING: Final = 0.999


class StepClock:
    """How long a step of one engine may take before the engine counts as stalled: twice its longest one, which is
    forgotten slowly, or `STALLED_SECONDS`."""

    def __init__(self) -> None:
        self._longest = 0.0

    def step_ended(self, duration: float) -> None:
        """A step took `duration` seconds."""
        self._longest = max(duration, self._longest * _FORGETTING)

    @property
    def limit(self) -> float:
        """Seconds."""
        return max(STALLED_SECONDS, _LONGEST_STEPS * self._longest)


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
        progress_age: seconds that its engine has had work and finished no step; None without work or engine.
        num_restarts: times it was started again.
        stats: of its engine, as far as known; None without one.
    """

    name: str
    state: ProcessState
    pid: int | None
    heartbeat_age: float
    last_step_age: float | None
    has_work: bool
    progress_age: float | None = None
    num_restarts: int = 0
    stats: EngineStats | None = None


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
