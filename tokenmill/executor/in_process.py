"""`InProcessExecutor`: the engine on a thread of the caller's process."""

from __future__ import annotations

import atexit
import os
import queue
import time
from collections.abc import Callable

from tokenmill.engine.core import EngineCore
from tokenmill.engine.request import GenerationRequest
from tokenmill.errors import ExecutorShutdownError
from tokenmill.executor import waiting
from tokenmill.executor.base_worker import BaseWorker
from tokenmill.executor.description import EngineDescription
from tokenmill.executor.executor import HURRY_SECONDS, GenerationExecutor, ProgressCallback
from tokenmill.executor.health import ExecutorHealth, ProcessHealth, ProcessState
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


class _LocalEngine:
    """The engine, made, stepped and freed on one thread. It knows no executor, which would live as long as the thread.

    Args:
        build, tokenizer, on_progress: see `InProcessExecutor`.
        table: gets what requests give.

    Attributes:
        started: gets one item: None when requests can be taken, or why they cannot.
        core, description, worker: there once it has started.
    """

    core: EngineCore
    description: EngineDescription
    worker: _LocalWorker

    def __init__(
        self,
        build: Callable[[ProgressCallback], tuple[EngineCore, EngineDescription]],
        tokenizer: TokenizerSource | None,
        table: RequestTable,
        on_progress: ProgressCallback | None,
    ) -> None:
        self._build: Callable[[ProgressCallback], tuple[EngineCore, EngineDescription]] | None = build
        self._tokenizer = tokenizer
        self._table = table
        self._on_progress = on_progress
        self._is_stopped = False
        self.started: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Build and step. Both on one thread: torch keeps a pool of threads for each thread that computes, and with two
        pools there are more threads than cores, at which OpenMP gives up the quick kind of waiting."""
        assert self._build is not None
        try:
            self.core, self.description = self._build(self._report)
            postprocessor = Postprocessor(None if self._tokenizer is None else self._tokenizer.load())
        except Exception as error:  # whatever a model or a machine raises while it loads is the caller's
            self.started.put(error)
            return
        finally:
            self._build = None  # with the files that it has read
        self.worker = _LocalWorker(self.core, postprocessor, self._table)
        self.started.put(None)
        try:
            if not self._is_stopped:
                self.worker.run()
        finally:
            self.core.release()

    def stop(self) -> None:
        """The thread ends when the engine next reports progress, or before its next step. On any thread, at any place:
        a queue that only C code touches is all that this needs."""
        self._is_stopped = True
        if hasattr(self, "worker"):
            self.worker.stop()

    def fail(self, cause: Exception) -> None:
        """The thread has ended with an error."""
        self._table.fail(cause)
        self.started.put(self._table.closed_by)  # if nobody waits for it any more, nobody reads it

    def _report(self, what: str, done: int, total: int) -> None:
        if self._is_stopped:
            raise ExecutorShutdownError("Nobody waits for this engine any more.")
        if self._on_progress is not None:
            self._on_progress(what, done, total)


class InProcessExecutor(GenerationExecutor):
    """Runs an engine on a thread.

    Args:
        build: makes the engine, on the thread that will run it.
        tokenizer: for text.
        max_requests, grace_period: see `GenerationExecutor`.
        on_progress: passed to `build`.

    Raises:
        Exception: what `build` raises.
    """

    def __init__(
        self,
        build: Callable[[ProgressCallback], tuple[EngineCore, EngineDescription]],
        tokenizer: TokenizerSource | None,
        *,
        max_requests: int,
        grace_period: float = 0.0,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        super().__init__(tokenizer, max_requests=max_requests, grace_period=grace_period)
        local = _LocalEngine(build, tokenizer, self._table, on_progress)
        self._thread = self._own_thread(local.run, local.stop, name="tokenmill-engine", on_error=local.fail)
        try:
            self._thread.start()
            if tokenizer is not None:
                tokenizer.load()  # while the engine is built
            error = waiting.get(local.started)
            if error is not None:
                raise error
        except BaseException:
            # A thread that is loading libraries when the interpreter ends can bring the process down.
            local.stop()
            self._thread.join(HURRY_SECONDS)
            atexit.unregister(self._at_exit)
            raise
        self._engine, self._worker, self._description = local.core, local.worker, local.description

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
        error = waiting.get(outcome, _INTEGRITY_TIMEOUT)
        if error is not None:
            raise error

    def _prepare(self, request: GenerationRequest) -> Callable[[], None]:
        return lambda: self._worker.submit(request)

    def _cancel(self, request_id: int, reason: FinishReason) -> None:
        self._worker.abort(request_id, reason)

    def _stop(self, patience: float | None) -> None:
        self._worker.stop()
        self._thread.join(patience)
