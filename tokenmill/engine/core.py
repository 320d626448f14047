"""`EngineCore`: the step loop. Whoever owns the engine calls `step` while `has_work`, and forwards the events."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from tokenmill.engine.events import EngineEvent
from tokenmill.engine.plan import BatchPlan, Interruption, RepeatingRunner, Runner, StepOutput
from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.step_recorder import StepRecorder
from tokenmill.errors import DeviceFaultError, EngineError, OutOfMemoryError, TokenmillError
from tokenmill.outputs import FinishReason
from tokenmill.telemetry.stats import EngineStats


class EngineCore:
    """A scheduler and a runner. One thread does all: adds, cancels, steps.

    Args:
        scheduler: what to compute.
        runner: computes it.
        recorder: keeps records of the last steps; None keeps none.
        overlap: keep a step in flight while the next is planned; worth it when the runner computes on another device.

    Attributes:
        interruption: steps are not repeated while it is set: somebody waits for this thread.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner[Any],
        recorder: StepRecorder | None = None,
        *,
        overlap: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._recorder = recorder if recorder is not None and recorder.is_on else None
        self._overlap = overlap
        self._launched: tuple[BatchPlan, Any] | None = None
        self.interruption = Interruption()
        if isinstance(runner, RepeatingRunner):
            runner.interrupt_when(self.interruption)

    def advance(self) -> list[EngineEvent]:
        """One step, in the engine's own way. Both ways give the same tokens."""
        return self.step_overlapped() if self._overlap else self.step()

    def step(self) -> list[EngineEvent]:
        """One step: schedule, run, commit."""
        assert self._launched is None, "a step is in flight; go on with step_overlapped"
        plan = self._schedule()
        if not plan.rows:
            return self.scheduler.take_events()
        try:
            output = self.runner.run(plan)
        except Exception as error:  # the boundary between the engine and a model: its requests fail, others go on
            return self._fail(plan, error, nothing_follows=True)
        return self._commit(plan, output)

    def step_overlapped(self) -> list[EngineEvent]:
        """One step, launched before the one before it is read: the device works while the host reads and plans."""
        plan = self._schedule()
        previous, self._launched = self._launched, None
        events = self._launch(plan) if plan.rows else []
        return events + (self._collect(*previous) if previous else self.scheduler.take_events())

    def _launch(self, plan: BatchPlan) -> list[EngineEvent]:
        try:
            self._launched = plan, self.runner.launch(plan)
        except Exception as error:  # see step
            return self._fail(plan, error, nothing_follows=True)
        return []

    def _collect(self, plan: BatchPlan, pending: Any) -> list[EngineEvent]:
        try:
            output = self.runner.collect(pending)
        except Exception as error:  # see step
            return self._fail(plan, error)
        return self._commit(plan, output)

    def _schedule(self) -> BatchPlan:
        plan = self.scheduler.schedule()
        if self._recorder is not None and plan.rows:
            self._recorder.begin(plan, self.scheduler.requests)
        return plan

    def _commit(self, plan: BatchPlan, output: StepOutput) -> list[EngineEvent]:
        events = self.scheduler.commit(plan, output)
        if self._recorder is not None:
            self._recorder.end(plan, self.scheduler.stats())
        return events

    def _fail(self, plan: BatchPlan, error: Exception, *, nothing_follows: bool = False) -> list[EngineEvent]:
        """The step could not be done. Without memory it is tried again, unless a later one is under way already."""
        if isinstance(error, DeviceFaultError):
            raise error  # no step will ever work again
        if isinstance(error, OutOfMemoryError) and nothing_follows:
            events = self.scheduler.retry(plan, error)
        else:
            events = self.scheduler.fail(plan, _as_engine_error(error))
        if self._recorder is not None:
            self._recorder.end(plan, self.scheduler.stats())
        return events

    def validate(self, request: GenerationRequest) -> None:
        """Raises `UserError` if the request can never run. Changes nothing; safe on any thread."""
        self.scheduler.validate(request)

    def add(self, request: GenerationRequest) -> None:
        """Put a request into the waiting queue; raises `UserError` if it can never run."""
        self.scheduler.add(request)

    def cancel(self, request_id: int, finish_reason: FinishReason = "cancelled") -> bool:
        """End a request; its events come with the next step. False if it is not here (any more)."""
        return self.scheduler.cancel(request_id, finish_reason)

    def finish_sequence(self, request_id: int, sequence_index: int, finish_reason: FinishReason) -> bool:
        """End one sequence for a reason found outside, such as a stop string. False if it has ended already."""
        return self.scheduler.finish_sequence(request_id, sequence_index, finish_reason)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def release(self) -> None:
        """Let go of the runner, with the model and its cache. No step can follow; statistics stay."""
        if self._launched is not None:
            with suppress(Exception):  # nobody waits for the step but the memory that it writes to
                self.runner.collect(self._launched[1])
            self._launched = None
        del self.runner

    def stats(self) -> EngineStats:
        """A snapshot of counters and gauges, with the records of the last steps."""
        stats = self.scheduler.stats()
        if self._recorder is None:
            return stats
        recent_steps, recent_requests = self._recorder.steps(), self._recorder.request_steps()
        return replace(stats, recent_steps=recent_steps, recent_requests=recent_requests)

    def check_integrity(self) -> None:
        """Raises AssertionError when requests, slots and cache blocks do not fit together."""
        self.scheduler.check_integrity()


def _as_engine_error(error: Exception) -> TokenmillError:
    if isinstance(error, TokenmillError):
        return error
    wrapped = EngineError(f"The model runner failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
