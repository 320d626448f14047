"""`StepRecorder`: keeps what the last steps did, as `StepStats` and `RequestSteps`. `EngineCore` calls it.

The engine's thread writes; any thread may read. Nothing is drained by reading: a reader that wants only what is new
remembers the last step that it saw. A recorder that is to keep nothing does nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from tokenmill.engine.plan import BatchPlan
from tokenmill.engine.sequence import Request, SequenceStatus
from tokenmill.telemetry.stats import EngineStats, RequestProgress, RequestStage, RequestSteps, StepStats


class StepRecorder:
    """Records of the last steps of one engine.

    Args:
        max_steps: records of steps to keep; 0 keeps none.
        max_request_steps: records of all requests in a step to keep; 0 keeps none.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self, max_steps: int = 0, max_request_steps: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps: deque[StepStats] = deque(maxlen=max_steps)
        self._request_steps: deque[RequestSteps] = deque(maxlen=max_request_steps)
        self._keeps_steps = max_steps > 0
        self._keeps_requests = max_request_steps > 0
        self._clock = clock
        self._lock = threading.Lock()  # guards the two deques
        self._before = EngineStats()
        self._num_prompt_tokens: dict[int, int] = {}  # slot -> length of the prompt in it
        self._start_times: dict[int, float] = {}
        self._requests: dict[int, Request] = {}  # open ones, and ended ones whose end is not recorded yet
        self._scheduled: dict[int, set[int]] = {}  # step -> requests with a row in its plan

    @property
    def is_on(self) -> bool:
        """Whether anything is kept."""
        return self._keeps_steps or self._keeps_requests

    def begin(self, plan: BatchPlan, requests: Mapping[int, Request]) -> None:
        """A plan was made and goes to the runner.

        Args:
            plan: with at least one row.
            requests: the open requests, by id.
        """
        self._start_times[plan.step] = self._clock()
        for new in plan.new_slots:
            self._num_prompt_tokens[new.slot] = new.num_prompt_tokens
        if self._keeps_requests:
            self._requests.update(requests)
            slots = {row.slot for row in plan.rows}
            self._scheduled[plan.step] = {
                request.id
                for request in requests.values()
                if any(sequence.slot in slots for sequence in request.sequences)
            }

    def end(self, plan: BatchPlan, after: EngineStats) -> None:
        """The plan was committed, or failed.

        Args:
            plan: one that began.
            after: the engine's counters now.
        """
        end_time = self._clock()
        step = self._make_step(plan, after, end_time, end_time - self._start_times.pop(plan.step))
        self._before = after
        requests = self._take_progress(plan.step) if self._keeps_requests else ()
        with self._lock:
            self._steps.append(step)
            self._request_steps.append(RequestSteps(step=plan.step, end_time=end_time, requests=requests))

    def steps(self) -> tuple[StepStats, ...]:
        """The last steps, oldest first."""
        with self._lock:
            return tuple(self._steps)

    def request_steps(self) -> tuple[RequestSteps, ...]:
        """The requests in the last steps, oldest first."""
        with self._lock:
            return tuple(self._request_steps)

    def _make_step(self, plan: BatchPlan, after: EngineStats, end_time: float, duration: float) -> StepStats:
        before = self._before
        num_prefills = sum(
            row.num_tokens > 1 or row.start < self._num_prompt_tokens.get(row.slot, 0) for row in plan.rows
        )
        return StepStats(
            step=plan.step,
            end_time=end_time,
            duration=duration,
            num_running=after.num_running,
            num_waiting=after.num_waiting,
            num_admitted=len(plan.new_slots),
            num_prefills=num_prefills,
            num_decodes=len(plan.rows) - num_prefills,
            num_prompt_tokens=after.num_prompt_tokens - before.num_prompt_tokens,
            num_generated_tokens=after.num_generated_tokens - before.num_generated_tokens,
            num_preemptions=after.num_preemptions - before.num_preemptions,
            num_finished=sum(after.num_finished.values()) - sum(before.num_finished.values()),
            kv_cache=after.kv_cache,
        )

    def _take_progress(self, step: int) -> tuple[RequestProgress, ...]:
        scheduled = self._scheduled.pop(step)
        progress = tuple(_progress_of(request, request.id in scheduled) for request in self._requests.values())
        self._requests = {id_: request for id_, request in self._requests.items() if request.num_unfinished}
        return progress


def _progress_of(request: Request, is_scheduled: bool) -> RequestProgress:
    first = request.sequences[0]
    num_generated_tokens = sum(sequence.num_generated_tokens for sequence in request.sequences)
    stage: RequestStage = "decode" if num_generated_tokens else "prefill"
    if request.num_unfinished == 0:
        stage = "finished"
    elif request.metrics.first_scheduled_time is None:
        stage = "waiting"
    return RequestProgress(
        request_id=request.id,
        stage=stage,
        num_prefilled_tokens=min(first.num_computed_tokens, request.num_prompt_tokens),
        num_generated_tokens=num_generated_tokens,
        is_scheduled=is_scheduled,
        is_preempted=any(
            sequence.status is SequenceStatus.WAITING and sequence.num_preemptions for sequence in request.sequences
        ),
    )
