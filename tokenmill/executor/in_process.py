"""`InProcessExecutor`: the engine on a thread of the caller's process.

Callers put commands into an inbox; the engine thread takes them between steps, so the engine has one owner and needs no
lock. Events of a step go through postprocessing to the results on the same thread.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from tokenmill.engine.core import EngineCore
from tokenmill.engine.events import EngineEvent, Failed, TokenDelta
from tokenmill.engine.request import GenerationRequest
from tokenmill.errors import EngineError, ExecutorShutdownError, QueueFullError, TokenmillError
from tokenmill.executor.engine_factory import EngineDescription
from tokenmill.executor.executor import GenerationExecutor
from tokenmill.executor.postproc import RequestPostprocessor
from tokenmill.executor.result import GenerationResult
from tokenmill.outputs import RequestMetrics
from tokenmill.telemetry.stats import EngineStats
from tokenmill.tokenization import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """One request under way."""

    result: GenerationResult
    postprocessor: RequestPostprocessor
    arrival_time: float


class InProcessExecutor(GenerationExecutor):
    """Runs `engine` on a thread.

    Args:
        engine: owned from now on.
        description: what the engine runs.
        tokenizer: for text output.
        max_queue_size: requests that may wait beside those that run.
    """

    def __init__(
        self, engine: EngineCore, description: EngineDescription, tokenizer: Tokenizer | None, *, max_queue_size: int
    ) -> None:
        self._engine = engine
        self._description = description
        self._tokenizer = tokenizer
        self._max_requests = max_queue_size + description.max_batch_size
        self._request_ids = itertools.count(1)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._entries: dict[int, _Entry] = {}
        self._lock = threading.Lock()  # guards _entries and _closed_by against submit and abort from other threads
        self._closed_by: TokenmillError | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="tokenmill-engine", daemon=True)
        self._thread.start()

    # ---- callers' threads ------------------------------------------------------------------------------------

    @property
    def description(self) -> EngineDescription:
        return self._description

    def next_request_id(self) -> int:
        return next(self._request_ids)

    def submit(
        self, request: GenerationRequest, *, prompt: str | None = None, streaming: bool = False
    ) -> GenerationResult:
        self._engine.validate(request)
        result = GenerationResult(
            request.request_id,
            prompt,
            request.prompt_token_ids,
            request.sampling,
            streaming=streaming,
            arrival_time=request.arrival_time,
            abort=self.abort_request,
        )
        postprocessor = RequestPostprocessor(self._tokenizer, request.sampling, request.prompt_token_ids)
        with self._lock:
            if self._closed_by is not None:
                raise self._closed_by
            if len(self._entries) >= self._max_requests:
                raise QueueFullError(
                    f"{len(self._entries)} requests are under way, which is the limit.",
                    remedy="Try again later, or raise max_queue_size.",
                )
            assert request.request_id not in self._entries, f"request id {request.request_id} is in use"
            self._entries[request.request_id] = _Entry(result, postprocessor, request.arrival_time)
            self._inbox.put(lambda: self._engine.add(request))
        return result

    def abort_request(self, request_id: int) -> bool:
        with self._lock:
            if request_id not in self._entries:
                return False
            self._inbox.put(lambda: self._cancel(request_id))
            return True

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def check_health(self) -> None:
        if self._closed_by is not None:
            raise self._closed_by
        if not self._thread.is_alive():
            raise EngineError("The engine's thread has ended.", remedy="Create the LLM anew.")

    def check_integrity(self) -> None:
        if not self._thread.is_alive():
            self._engine.check_integrity()
            return
        outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def check() -> None:
            try:
                self._engine.check_integrity()
            except AssertionError as error:
                outcome.put(error)
            else:
                outcome.put(None)

        self._inbox.put(check)
        error = outcome.get(timeout=60)
        if error is not None:
            raise error

    def shutdown(self) -> None:
        self._close(ExecutorShutdownError("The executor is shut down."))
        self._inbox.put(self._stop)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # ---- the engine's thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_commands()
                if self._engine.has_work and not self._stopping:
                    self._deliver(self._engine.advance())
        except Exception as error:  # the last line of defence: no caller may wait for a dead engine
            logger.exception("The engine ended with an error.")
            cause = EngineError(f"The engine ended with {type(error).__name__}: {error}.")
            cause.__cause__ = error
            self._close(cause)
        finally:
            self._end_all()

    def _take_commands(self) -> None:
        """Run what callers asked for; wait for something to do when the engine has nothing."""
        command: Callable[[], None] | None
        try:
            command = self._inbox.get(block=not self._engine.has_work)
            while command is not None:
                command()
                command = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _cancel(self, request_id: int) -> None:
        self._engine.cancel(request_id)

    def _stop(self) -> None:
        self._stopping = True

    def _deliver(self, events: list[EngineEvent]) -> None:
        for event in events:
            entry = self._entries.get(event.request_id)
            if entry is None:
                continue
            if isinstance(event, TokenDelta):
                self._deliver_delta(entry, event)
                continue
            with self._lock:
                del self._entries[event.request_id]
            entry.result.finish(event.metrics, event.error if isinstance(event, Failed) else None)

    def _deliver_delta(self, entry: _Entry, event: TokenDelta) -> None:
        output, hit_stop_string = entry.postprocessor.process(event)
        if output is not None:
            entry.result.push(output)
        if hit_stop_string:
            self._engine.finish_sequence(event.request_id, event.sequence_index, "stop")

    def _close(self, cause: TokenmillError) -> None:
        with self._lock:
            if self._closed_by is None:
                self._closed_by = cause

    def _end_all(self) -> None:
        """Give every open request its terminal event and the engine its rest."""
        assert self._closed_by is not None or self._stopping
        with self._lock:
            entries, self._entries = list(self._entries.items()), {}
        for request_id, entry in entries:
            self._engine.cancel(request_id)
            error = self._closed_by or ExecutorShutdownError("The executor is shut down.")
            entry.result.finish(RequestMetrics(arrival_time=entry.arrival_time), error)
