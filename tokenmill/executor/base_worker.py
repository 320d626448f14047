"""`BaseWorker`: owns an engine and steps it. The same in the caller's process and in a worker process.

Others put commands into an inbox; the engine's thread takes them between steps, so the engine has one owner and needs
no lock. What a step gives goes through postprocessing, if there is some, to `deliver`, which a subclass writes.
"""

from __future__ import annotations

import queue
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from tokenmill.engine.core import EngineCore
from tokenmill.engine.events import EngineEvent, TokenDelta
from tokenmill.engine.request import GenerationRequest
from tokenmill.errors import TokenmillError
from tokenmill.executor.garbage import rare_collections
from tokenmill.executor.health import StepClock
from tokenmill.executor.iteration_queue import IterationResultQueue
from tokenmill.executor.postproc import Ended, Postprocessed, Postprocessor, split_events
from tokenmill.outputs import FinishReason, RequestMetrics
from tokenmill.telemetry.stats import EngineStats, IterationStats


class BaseWorker(ABC):
    """Steps `engine` in `run`, on one thread; the other methods may be called on any.

    Args:
        engine: owned from now on.
        postprocessor: turns tokens into text on the engine's thread; None: `deliver_raw` gets the tokens.
        replica: the worker's number, for records.
    """

    def __init__(self, engine: EngineCore, postprocessor: Postprocessor | None, *, replica: int = 0) -> None:
        self._engine = engine
        self._postprocessor = postprocessor
        self._replica = replica
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._stopping = False
        self._last = EngineStats()
        self._progress_time: float | None = None  # None while there is nothing to do
        self.steps = StepClock()
        self.iterations = IterationResultQueue()
        """Records of steps."""

    # ---- any thread ------------------------------------------------------------------------------------------

    def call(self, command: Callable[[], object]) -> None:
        """Run `command` on the engine's thread, between two steps. What it raises ends the worker."""
        self._inbox.put(command)
        self._engine.interruption.set()  # after it, or the engine might clear it and find nothing

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; if the engine refuses it, it ends with that error."""
        self.call(lambda: self._add(request))

    def abort(self, request_id: int, reason: FinishReason) -> None:
        """End a request, if it is here."""
        self.call(lambda: self._engine.cancel(request_id, reason))

    def finish_sequence(self, request_id: int, sequence_index: int) -> None:
        """End a sequence whose text has a stop string."""
        self.call(lambda: self._engine.finish_sequence(request_id, sequence_index, "stop"))

    def stop(self) -> None:
        """End `run` after the step that is under way."""
        self.call(self._stop)

    @property
    def has_work(self) -> bool:
        """Whether requests are under way or about to be taken."""
        return self._engine.has_work or not self._inbox.empty()

    @property
    def progress_age(self) -> float | None:
        """Seconds that the engine has had work and finished no step; None without work."""
        since = self._progress_time
        return None if since is None else time.monotonic() - since

    def stats(self) -> EngineStats:
        """A snapshot of the engine, records of steps included."""
        return self._engine.stats()

    def counters(self) -> EngineStats:
        """The same without records, which may be many."""
        return self._engine.scheduler.stats()

    # ---- the engine's thread ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Step until `stop`. What an engine raises past its own boundaries comes out here."""
        with rare_collections():
            while not self._stopping:
                self._take_commands()
                if self._engine.has_work and not self._stopping:
                    started = time.monotonic()
                    events = self._engine.advance()
                    self._record(started)
                    self._progress_time = time.monotonic()
                    if events:
                        self._handle(events)

    def check_integrity(self) -> None:
        """Assert that the engine has lost nothing. On the engine's thread, or after its end."""
        self._engine.check_integrity()

    @abstractmethod
    def deliver(self, result: Postprocessed) -> None:
        """Hand what a step gave to callers. Called on the engine's thread."""

    def deliver_raw(self, deltas: list[TokenDelta], ended: list[Ended]) -> None:
        """The same without text, for a worker that has no postprocessor."""
        raise NotImplementedError

    def _take_commands(self) -> None:
        """Run what others asked for; wait for something to do when the engine has nothing."""
        self._engine.interruption.clear()  # before the look: what comes later sets it again
        try:
            if not self._engine.has_work:
                self._progress_time = None
            command = self._inbox.get(block=not self._engine.has_work)
            if self._progress_time is None:
                self._progress_time = time.monotonic()
            while not self._stopping:
                command()
                command = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _add(self, request: GenerationRequest) -> None:
        try:
            self._engine.add(request)
        except TokenmillError as error:
            self._hand_out([], [Ended(request.request_id, RequestMetrics(request.arrival_time), error)])
            return
        if self._postprocessor is not None:
            self._postprocessor.open(request.request_id, request.sampling, request.prompt_token_ids)

    def _handle(self, events: list[EngineEvent]) -> None:
        self._hand_out(*split_events(events))

    def _hand_out(self, deltas: list[TokenDelta], ended: list[Ended]) -> None:
        if self._postprocessor is None:
            self.deliver_raw(deltas, ended)
            return
        result = self._postprocessor.process(deltas, ended)
        for hit in result.stop_hits:
            self._engine.finish_sequence(hit.request_id, hit.sequence_index, "stop")
        self.deliver(result)

    def _stop(self) -> None:
        self._stopping = True

    def _record(self, started: float) -> None:
        now, last = self.counters(), self._last
        if now.num_steps == last.num_steps:
            return
        self._last = now
        end_time = time.monotonic()
        self.steps.step_ended(end_time - started)
        self.iterations.put(
            IterationStats(
                replica=self._replica,
                step=now.num_steps,
                end_time=end_time,
                duration=end_time - started,
                num_running=now.num_running,
                num_waiting=now.num_waiting,
                num_prompt_tokens=now.num_prompt_tokens - last.num_prompt_tokens,
                num_generated_tokens=now.num_generated_tokens - last.num_generated_tokens,
                num_preemptions=now.num_preemptions - last.num_preemptions,
                num_free_blocks=now.kv_cache.num_free_blocks,
            )
        )
