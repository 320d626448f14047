"""`InProcessExecutor`: the engine on a thread of the caller's process."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable

from tokenmill.engine.core import EngineCore
from tokenmill.engine.request import GenerationRequest
from tokenmill.executor.base_worker import BaseWorker
from tokenmill.executor.description import EngineDescription
from tokenmill.executor.executor import GenerationExecutor
from tokenmill.executor.health import ExecutorHealth, ProcessHealth, ProcessState
from tokenmill.executor.managed_thread import ManagedThread
from tokenmill.executor.postproc import Postprocessed, Postprocessor
from tokenmill.executor.request_table import RequestTable
from tokenmill.executor.tokenizer_source import TokenizerSource
from tokenmill.outputs import FinishReason
from tokenmill.telemetry.stats import EngineStats, IterationStats

_INTEGRITY_TIMEOUT = 60.0


class _LocalWorker(BaseWorker):
    """Hands results straight to the table of requests."""

    def __init__(self, engine: EngineCore, postprocessor: Postprocessor, table: RequestTable) -> None:
        super().__init__(engine, postprocessor)
        self._table = table

    def deliver(self, result: Postprocessed) -> None:
        for request_id, output in result.outputs:
            self._table.push(request_id, output)
        for ended in result.ended:
            self._table.finish(ended.request_id, ended.error, ended.metrics)


class InProcessExecutor(GenerationExecutor):
    """Runs `engine` on a thread.

    Args:
        engine: owned from now on.
        description: what the engine runs.
        tokenizer: for text.
        max_queue_size: requests that may wait beside those that run.
        grace_period: see `GenerationExecutor`.
    """

    def __init__(
        self,
        engine: EngineCore,
        description: EngineDescription,
        tokenizer: TokenizerSource | None,
        *,
        max_queue_size: int,
        grace_period: float = 0.0,
    ) -> None:
        super().__init__(tokenizer, max_requests=max_queue_size + description.max_batch_size, grace_period=grace_period)
        self._engine = engine
        self._description = description
        postprocessor = Postprocessor(None if tokenizer is None else tokenizer.load())
        self._worker = _LocalWorker(engine, postprocessor, self._table)
        self._thread = ManagedThread(self._worker.run, name="tokenmill-engine", on_error=self._table.fail)
        self._thread.start()

    @property
    def description(self) -> EngineDescription:
        return self._description

    def stats(self) -> EngineStats:
        return self._table.with_outcomes(self._engine.stats())

    def get_iteration_stats(self, timeout: float = 0.0) -> list[IterationStats]:
        return self._worker.iterations.get_all(timeout)

    def health(self) -> ExecutorHealth:
        state, message = self._judge()
        stats = self._engine.stats()
        process = ProcessHealth(
            name="engine",
            state=state,
            pid=os.getpid(),
            heartbeat_age=0.0,
            last_step_age=None if stats.last_step_time is None else time.monotonic() - stats.last_step_time,
            has_work=self._worker.has_work,
            progress_age=self._worker.progress_age,
            stats=stats,
        )
        return ExecutorHealth("healthy" if state == "ready" else "unhealthy", message, (process,))

    def _judge(self) -> tuple[ProcessState, str]:
        """The engine's state, and what is wrong."""
        if self._table.closed_by is not None:
            return "stopped", str(self._table.closed_by)
        if not self._thread.is_alive:
            return "stopped", "The engine's thread has ended."
        age = self._worker.progress_age
        if age is not None and age > self._worker.steps.limit:
            return "stalled", f"The engine has work and has made no progress for {age:.1f} s."
        return "ready", ""

    def check_integrity(self) -> None:
        if not self._thread.is_alive:
            self._worker.check_integrity()
            return
        outcome: queue.SimpleQueue[AssertionError | None] = queue.SimpleQueue()

        def check() -> None:
            try:
                self._worker.check_integrity()
            except AssertionError as error:
                outcome.put(error)
            else:
                outcome.put(None)

        self._worker.call(check)
        error = outcome.get(timeout=_INTEGRITY_TIMEOUT)
        if error is not None:
            raise error

    def _prepare(self, request: GenerationRequest) -> Callable[[], None]:
        return lambda: self._worker.submit(request)

    def _cancel(self, request_id: int, reason: FinishReason) -> None:
        self._worker.abort(request_id, reason)

    def _stop(self) -> None:
        self._worker.stop()
        self._thread.join()
