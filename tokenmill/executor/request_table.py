"""`RequestTable`: the requests that an executor has taken, and how each comes to its one terminal event.

Every executor has one, whatever runs its requests. Callers' threads open requests, the executor's threads push and
finish them; what comes for a request that has ended is dropped here. It counts what callers saw.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace

from tokenmill.engine.request import GenerationRequest
from tokenmill.errors import EngineError, QueueFullError, TokenmillError
from tokenmill.executor.postproc import OutputDelta
from tokenmill.executor.result import GenerationResult
from tokenmill.executor.waiting import wait_for
from tokenmill.outputs import RequestMetrics
from tokenmill.telemetry.stats import EngineStats


@dataclass(slots=True)
class _Entry:
    """One request under way."""

    result: GenerationResult
    arrival_time: float
    finish_reason: str = "cancelled"


class RequestTable:
    """Open requests by id. Thread-safe.

    Args:
        max_requests: more than these at a time are refused.
    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._entries: dict[int, _Entry] = {}
        self._changed = threading.Condition()
        self._closed_by: TokenmillError | None = None
        self._num_finished: dict[str, int] = {}
        self._num_rejected = 0

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def closed_by(self) -> TokenmillError | None:
        """Why no more requests are taken; None while they are."""
        return self._closed_by

    @property
    def is_full(self) -> bool:
        """Whether one more request would be refused."""
        return len(self._entries) >= self._max_requests

    def with_outcomes(self, stats: EngineStats) -> EngineStats:
        """`stats` with what callers got, which an engine does not know of all requests."""
        with self._changed:
            num_finished = dict(self._num_finished)
        return replace(stats, num_finished=num_finished, num_rejected=self._num_rejected)

    def open(
        self, request: GenerationRequest, prompt: str | None, *, streaming: bool, abort: Callable[[int], bool]
    ) -> GenerationResult:
        """Take a request.

        Raises:
            QueueFullError: there are too many.
            ExecutorShutdownError, EngineError: the table is closed.
        """
        result = GenerationResult(
            request.request_id,
            prompt,
            request.prompt_token_ids,
            request.sampling,
            streaming=streaming,
            arrival_time=request.arrival_time,
            abort=abort,
        )
        with self._changed:
            if self._closed_by is not None:
                raise copy(self._closed_by) from self._closed_by.__cause__  # a traceback of its own
            if self.is_full:
                self._num_rejected += 1
                raise QueueFullError(
                    f"{len(self._entries)} requests are under way, which is the limit.",
                    remedy="Try again later, or raise max_queue_size.",
                )
            assert request.request_id not in self._entries, f"request id {request.request_id} is in use"
            self._entries[request.request_id] = _Entry(result, request.arrival_time)
        return result

    def push(self, request_id: int, delta: OutputDelta) -> None:
        """Hand out what is new."""
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.finish_reason = delta.finish_reason or entry.finish_reason
            entry.result.push(delta)

    def finish(
        self, request_id: int, error: TokenmillError | None = None, metrics: RequestMetrics | None = None
    ) -> bool:
        """The terminal event; False if it has come before."""
        with self._changed:
            entry = self._entries.pop(request_id, None)
            if entry is None:
                return False
            outcome = entry.finish_reason if error is None else error.code
            self._num_finished[outcome] = self._num_finished.get(outcome, 0) + 1
            self._changed.notify_all()
        entry.result.finish(metrics or RequestMetrics(arrival_time=entry.arrival_time), error)
        return True

    def restart(self, request_id: int) -> bool:
        """Forget what came for a request, to run it again; False if somebody has seen some of it, or it ended."""
        entry = self._entries.get(request_id)
        return entry is not None and entry.result.restart()

    def close(self, cause: TokenmillError) -> None:
        """Take no more requests. The first cause stays."""
        with self._changed:
            self._closed_by = self._closed_by or cause

    def finish_all(self, error: TokenmillError) -> list[int]:
        """Every open request ends with `error`; returns their ids."""
        return [request_id for request_id in list(self._entries) if self.finish(request_id, error)]

    def fail(self, cause: Exception) -> None:
        """What runs the requests has ended with an error: no caller may wait for it."""
        error = cause if isinstance(cause, TokenmillError) else _as_engine_error(cause)
        self.close(error)
        self.finish_all(error)

    def wait_until_idle(self, timeout: float) -> bool:
        """Wait for the last request to end; False if it has not within `timeout` seconds."""
        with self._changed:
            return wait_for(self._changed, lambda: not self._entries, timeout)


def _as_engine_error(cause: Exception) -> EngineError:
    error = EngineError(f"The engine ended with {type(cause).__name__}: {cause}.", remedy="Create the LLM anew.")
    error.__cause__ = cause
    return error
