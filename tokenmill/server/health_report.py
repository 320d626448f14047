"""Bodies of the health endpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel

from tokenmill.executor.health import HealthState, ProcessState
from tokenmill.server.responses import ErrorDetail

if TYPE_CHECKING:
    from tokenmill.executor.health import ExecutorHealth


class Status(BaseModel):
    """It is so."""

    status: Literal["ok"]


class ProcessReport(BaseModel, use_attribute_docstrings=True):
    """One engine, in the server's process or in a worker process, or a postprocessing worker."""

    name: str
    """`engine`, `worker-0`, `postproc-1`."""
    state: ProcessState
    """`silent`: alive but not heard. `stalled`: heard, but its engine has work and finishes no step. `failed`: given up
    after too many restarts."""
    pid: int | None
    """Null when there is no process now."""
    heartbeat_age: float
    """Seconds since it was last heard."""
    last_step_age: float | None
    """Seconds since its engine's last step; null before the first."""
    has_work: bool
    """Whether requests are under way in it."""
    progress_age: float | None
    """Seconds that its engine has had work and finished no step; null without work."""
    num_restarts: int
    """Times it was started again."""


class HealthReport(BaseModel, use_attribute_docstrings=True):
    """Answer of `/health`."""

    status: HealthState
    """`healthy`; `degraded`: some engines cannot run requests; `unhealthy`: none can."""
    processes: list[ProcessReport]
    """What runs requests."""

    @classmethod
    def of(cls, health: ExecutorHealth) -> Self:
        """What is known of an executor."""
        names = ProcessReport.model_fields
        processes = [ProcessReport(**{name: getattr(process, name) for name in names}) for process in health.processes]
        return cls(status=health.state, processes=processes)


class UnhealthyReport(HealthReport):
    """Answer of `/health` when something is wrong."""

    error: ErrorDetail
