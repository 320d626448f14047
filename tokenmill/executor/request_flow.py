"""`RequestFlow`: requests between callers and processes. Queue, dispatch, results, and a second chance after a death.

All methods run on the coordinator's thread, which therefore owns every job. A request is in exactly one place: in the
queue, or with one replica under the number of its attempt; what arrives under another number is of the past.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Final

from tokenmill.errors import TokenmillError
from tokenmill.executor.dispatch import choose_replica
from tokenmill.executor.messages import (
    Abort,
    EngineEvents,
    FinishSequence,
    Forget,
    OpenRequest,
    StepOutputs,
    Submit,
)
from tokenmill.executor.postproc import OutputDelta
from tokenmill.executor.replica import Job, Replica
from tokenmill.executor.request_table import RequestTable
from tokenmill.executor.supervised import SupervisedProcess
from tokenmill.outputs import FinishReason, RequestMetrics

logger = logging.getLogger(__name__)

_CANCEL_SECONDS: Final = 1.0
"""A worker that does not answer to a cancellation for so long is not waited for."""


class RequestFlow:
    """See the module.

    Args:
        table: where callers get their results from.
        replicas: what runs requests.
        postprocs: postprocessing workers; may be empty.
        max_attempts: how often a request is tried.
    """

    def __init__(
        self,
        table: RequestTable,
        replicas: Sequence[Replica],
        postprocs: Sequence[SupervisedProcess],
        max_attempts: int,
    ) -> None:
        self._table = table
        self._replicas = replicas
        self._postprocs = postprocs
        self._max_attempts = max_attempts
        self._jobs: dict[int, Job] = {}  # by request id
        self._attempts: dict[int, Job] = {}  # by attempt
        self._queue: list[Job] = []  # best rank first
        self._cancelling: list[Job] = []
        self._num_at = [0] * len(postprocs)
        self._num_attempts = 0
        self._drained_by: TokenmillError | None = None
        self.num_retries = 0

    @property
    def num_queued(self) -> int:
        """Sequences of requests that no process has yet."""
        return sum(job.num_sequences for job in self._queue)

    # ---- from callers ----------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a request, unless it ended before it got here."""
        if self._drained_by is not None:
            self._table.finish(job.request.request_id, self._drained_by)
        elif job.request.request_id in self._table:
            self._jobs[job.request.request_id] = job
            self._enqueue(job)

    def cancel(self, request_id: int, reason: FinishReason, now: float) -> None:
        """End a request. One that runs ends when its worker says so, or doesn't within a second."""
        job = self._jobs.get(request_id)
        if job is None:
            return
        if job.replica is None:
            self._queue.pop(bisect_left(self._queue, job.rank, key=_rank))
            self._end_cancelled(job, reason)
            return
        if job.cancel_reason is None:
            job.cancel_reason = reason
            job.cancel_time = now
            self._cancelling.append(job)
            job.replica.process.send(Abort(job.attempt, reason))
        if request_id not in self._table:
            self._release(job)

    def drain(self, error: TokenmillError) -> None:
        """No more is taken: what waits ends with `error`; what runs goes on, but gets no second attempt."""
        self._drained_by = error
        self.fail_queued(error)

    # ---- dispatch --------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Send what can be sent, best rank first; nobody overtakes the first."""
        while self._queue:
            job = self._queue[0]
            alone = 0 < job.num_attempts == self._max_attempts - 1
            candidates = [replica for replica in self._replicas if replica.has_room_for(job, alone=alone)]
            postprocs = [process for process in self._postprocs if process.state == "ready"]
            if not candidates or (self._postprocs and not postprocs):
                return
            del self._queue[0]
            replica = self._choose(job, candidates)
            postproc = min(postprocs, key=self._num_jobs_at) if postprocs else None
            self._start(job, replica, postproc, alone)

    def _choose(self, job: Job, candidates: list[Replica]) -> Replica:
        if len(candidates) == 1:
            return candidates[0]
        assert candidates[0].description is not None
        index = choose_replica(
            [replica.load_for(job) for replica in candidates],
            num_prompt_tokens=len(job.request.prompt_token_ids),
            num_blocks=job.num_blocks,
            tokens_per_block=candidates[0].description.tokens_per_block,
        )
        return self._replicas[index]

    def _start(self, job: Job, replica: Replica, postproc: SupervisedProcess | None, alone: bool) -> None:
        self._num_attempts += 1
        job.begin(self._num_attempts, replica, postproc, alone=alone)
        self._attempts[job.attempt] = job
        replica.add(job)
        if postproc is not None:
            self._num_at[postproc.index] += 1
            postproc.send(OpenRequest(job.attempt, job.request.sampling, job.request.prompt_token_ids))
        replica.process.send(Submit(job.attempt, job.encoded, 0 if postproc is None else postproc.index))

    def _num_jobs_at(self, postproc: SupervisedProcess) -> int:
        return self._num_at[postproc.index]

    # ---- from processes --------------------------------------------------------------------------------------

    def on_events(self, message: EngineEvents) -> None:
        """A worker's events go on to postprocessing workers as they are."""
        for index, batch in message.batches:
            self._postprocs[index].send_encoded(batch)

    def on_outputs(self, message: StepOutputs, *, from_worker: bool) -> None:
        """Results for callers, from a worker or a postprocessing worker."""
        for attempt, output in message.outputs:
            job = self._attempts.get(attempt)
            if job is not None and job.replica is not None:
                job.replica.count_output(job, len(output.token_ids))
                self._table.push(job.request.request_id, output)
        for hit in message.stop_hits:
            job = self._attempts.get(hit.request_id)
            if job is not None and job.replica is not None:
                job.replica.process.send(FinishSequence(hit))
        for ended in message.ended:
            job = self._attempts.get(ended.request_id)
            if job is not None:
                self._release(job, is_known_to_postproc=from_worker)
                self._table.finish(job.request.request_id, ended.error, ended.metrics)

    def give_up_on_cancelled(self, now: float) -> None:
        """End what was cancelled and whose worker does not say so."""
        if not self._cancelling:
            return
        open_jobs = [job for job in self._cancelling if job.attempt in self._attempts]
        self._cancelling = [job for job in open_jobs if now - job.cancel_time <= _CANCEL_SECONDS]
        for job in open_jobs:
            if job not in self._cancelling and job.cancel_reason is not None:
                self._release(job)
                self._end_cancelled(job, job.cancel_reason)

    # ---- deaths ----------------------------------------------------------------------------------------------

    def on_worker_death(self, replica: Replica, error: TokenmillError) -> None:
        """A worker is gone; its requests are run again, or end with `error`."""
        for job in replica.on_death():
            self._release(job)
            self._retry(job, error)

    def on_postproc_death(self, postproc: SupervisedProcess, error: TokenmillError) -> None:
        """A postprocessing worker is gone: the same for requests whose text it made."""
        jobs = [job for job in self._attempts.values() if job.postproc is postproc]
        for job in sorted(jobs, key=_rank):
            assert job.replica is not None
            job.replica.process.send(Abort(job.attempt, "cancelled"))
            self._release(job, is_known_to_postproc=False)
            self._retry(job, error)

    def _retry(self, job: Job, error: TokenmillError) -> None:
        request_id = job.request.request_id
        if job.cancel_reason is not None:
            self._end_cancelled(job, job.cancel_reason)
            return
        may_try = self._drained_by is None and job.num_attempts < self._max_attempts
        if may_try and self._table.restart(request_id):
            self.num_retries += 1
            self._jobs[request_id] = job
            self._enqueue(job)
        else:
            self._end_failed(job, error)

    def _end_failed(self, job: Job, error: TokenmillError) -> None:
        attempts = f" It was tried {job.num_attempts} times." if job.num_attempts > 1 else ""
        mine = type(error)(f"{error.message}{attempts}", remedy=error.remedy)
        self._table.finish(job.request.request_id, mine)

    def fail_queued(self, error: TokenmillError) -> None:
        """Nothing will ever run what waits."""
        queue, self._queue = self._queue, []
        for job in queue:
            del self._jobs[job.request.request_id]
            self._table.finish(job.request.request_id, error)

    # ---- one job ---------------------------------------------------------------------------------------------

    def _enqueue(self, job: Job) -> None:
        job.attempt = 0
        insort(self._queue, job, key=_rank)

    def _release(self, job: Job, *, is_known_to_postproc: bool = True) -> None:
        """No process has to do with the job any more."""
        self._attempts.pop(job.attempt, None)
        self._jobs.pop(job.request.request_id, None)
        if job.replica is not None:
            job.replica.remove(job)
        if job.postproc is not None:
            self._num_at[job.postproc.index] -= 1
            if is_known_to_postproc:
                job.postproc.send(Forget(job.attempt))
        job.replica = job.postproc = None

    def _end_cancelled(self, job: Job, reason: FinishReason) -> None:
        """The end that an engine would have given to a cancelled request."""
        request = job.request
        self._jobs.pop(request.request_id, None)
        for index in range(job.num_sequences):
            self._table.push(request.request_id, OutputDelta(index, finish_reason=reason))
        self._table.finish(request.request_id, None, RequestMetrics(arrival_time=request.arrival_time))


def _rank(job: Job) -> tuple[float, int]:
    return job.rank
