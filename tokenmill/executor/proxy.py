"""`GenerationExecutorProxy`: engines in worker processes, behind the same methods as the in-process executor.

It starts `num_replicas` workers (and postprocessing workers), sends each request to the least busy one, runs requests
again whose worker died before anything of them was handed out, and restarts what dies or hangs. The work is done by the
`Coordinator` on its thread; this class is what callers see of it. Imports no torch.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

import msgspec
import zmq

from tokenmill.config import LlmArgs
from tokenmill.engine.request import GenerationRequest
from tokenmill.errors import InvalidParameterError, ProtocolError
from tokenmill.executor import waiting
from tokenmill.executor.coordinator import Coordinator
from tokenmill.executor.description import EngineDescription
from tokenmill.executor.dispatch import prefix_keys
from tokenmill.executor.executor import GenerationExecutor, ProgressCallback
from tokenmill.executor.health import ExecutorHealth, HealthState
from tokenmill.executor.ipc import IpcFolder
from tokenmill.executor.messages import Progress, StartPostproc, StartWorker, TokenizerLocation, request_codec
from tokenmill.executor.replica import Job, Replica
from tokenmill.executor.request_flow import RequestFlow
from tokenmill.executor.supervised import SILENT_SECONDS, SupervisedProcess
from tokenmill.executor.tokenizer_source import TokenizerSource
from tokenmill.outputs import FinishReason
from tokenmill.telemetry.stats import EngineStats, WorkerStats, merge_stats

_INTEGRITY_TIMEOUT: Final = 60.0


class GenerationExecutorProxy(GenerationExecutor):
    """See the module; made by `GenerationExecutor.create`, which says what is raised.

    Args:
        args: `args.num_replicas` is 1 or more, `args.model` a local path.
        tokenizer: for text.
        on_progress: called while weights are loaded, on the caller's thread.
    """

    def __init__(
        self, args: LlmArgs, tokenizer: TokenizerSource | None, on_progress: ProgressCallback | None = None
    ) -> None:
        super().__init__(
            tokenizer,
            max_requests=args.max_queue_size + args.num_replicas * args.max_batch_size,
            grace_period=args.worker_config.grace_period,
        )
        self._codec = request_codec()
        self._by_priority = args.scheduler_config.waiting_queue_policy == "priority"
        self._progress: queue.SimpleQueue[Progress] = queue.SimpleQueue()
        self._folder = IpcFolder()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._replicas, self._postprocs = _make_processes(args, tokenizer, self._folder, context)
        except BaseException:
            _free(context, self._folder)
            raise
        self._flow = RequestFlow(self._table, self._replicas, self._postprocs, args.worker_config.max_attempts)
        self._coordinator = Coordinator(
            self._table, self._flow, self._replicas, self._postprocs, self._iterations, self._progress.put
        )
        self._thread = self._own_thread(
            partial(_coordinate, self._coordinator, context, self._folder),
            self._coordinator.stop,
            name="tokenmill-coordinator",
            on_error=self._coordinator.fail,
        )
        self._thread.start()
        try:
            self._wait_until_ready(on_progress)
        except BaseException:
            self.shutdown(0.0)
            raise

    def _wait_until_ready(self, on_progress: ProgressCallback | None) -> None:
        """Until all processes are ready; the caller's own tokenizer loads meanwhile."""
        if self._tokenizer is not None:
            self._tokenizer.load()
        while True:
            try:
                error = waiting.get(self._coordinator.started, 0.05 if on_progress else None)
            except queue.Empty:
                self._show_progress(on_progress)
                continue
            if error is not None:
                raise error
            self._show_progress(on_progress)
            return

    def _show_progress(self, on_progress: ProgressCallback | None) -> None:
        while on_progress is not None and not self._progress.empty():
            progress = self._progress.get()
            on_progress(progress.what, progress.done, progress.total)

    # ---- state -----------------------------------------------------------------------------------------------

    @property
    def description(self) -> EngineDescription:
        description = self._coordinator.description
        assert description is not None, "no worker has been ready"
        return description

    def stats(self) -> EngineStats:
        total = merge_stats([replica.stats() for replica in self._replicas])
        processes = [*(replica.process for replica in self._replicas), *self._postprocs]
        workers = WorkerStats(
            num_replicas=len(self._replicas),
            num_ready=sum(replica.process.state == "ready" for replica in self._replicas),
            num_deaths=sum(process.num_deaths for process in processes),
            num_restarts=sum(process.num_restarts for process in processes),
            num_stalls=sum(process.num_stalls for process in processes),
            num_retries=self._flow.num_retries,
        )
        num_waiting = total.num_waiting + self._flow.num_queued
        return self._table.with_outcomes(replace(total, num_waiting=num_waiting, workers=workers))

    def health(self) -> ExecutorHealth:
        clock, now = self._coordinator.clock, time.monotonic()
        workers = []
        for replica in self._replicas:
            last = replica.last_step_time
            workers.append(replica.process.health(clock, None if last is None else now - last, replica.stats()))
        postprocs = [process.health(clock, None, None) for process in self._postprocs]
        state, message = self._judge()
        return ExecutorHealth(state, message, (*workers, *postprocs))

    def _judge(self) -> tuple[HealthState, str]:
        if self._table.closed_by is not None:
            return "unhealthy", str(self._table.closed_by)
        if not self._thread.is_alive or self._coordinator.turn_age > SILENT_SECONDS:
            return "unhealthy", "The thread that talks to the workers does not answer."
        broken = []
        state: HealthState = "healthy"
        for processes in ([replica.process for replica in self._replicas], self._postprocs):
            names = [f"{process.name} is {process.state.replace('_', ' ')}" for process in processes
                     if process.state != "ready"]  # fmt: skip
            broken += names
            if names:
                state = "unhealthy" if state == "unhealthy" or len(names) == len(processes) else "degraded"
        return state, ", ".join(broken)

    def check_integrity(self) -> None:
        if not self._thread.is_alive:
            return
        problems = self._coordinator.check_integrity(_INTEGRITY_TIMEOUT)
        if problems:
            raise AssertionError("; ".join(problems))

    # ---- what differs from other executors -------------------------------------------------------------------

    def _prepare(self, request: GenerationRequest) -> Callable[[], None]:
        try:
            encoded = msgspec.Raw(self._codec.encode(request))
        except ProtocolError as error:
            raise InvalidParameterError(f"The request cannot be sent to a worker: {error.message}") from error
        description = self.description
        sampling = request.sampling
        length = min(len(request.prompt_token_ids) + sampling.max_tokens, description.max_seq_len)
        prefix = prefix_keys(request.prompt_token_ids, description.tokens_per_block) if len(self._replicas) > 1 else ()
        job = Job(
            request=request,
            encoded=encoded,
            rank=(-request.priority if self._by_priority else 0.0, request.request_id),
            prefix=prefix,
            num_blocks=description.blocks_for(length) * sampling.num_sequences,
        )
        return lambda: self._coordinator.call(lambda: self._flow.submit(job))

    def _cancel(self, request_id: int, reason: FinishReason) -> None:
        self._coordinator.call(lambda: self._flow.cancel(request_id, reason, self._coordinator.clock))

    def _stop(self, patience: float | None) -> None:
        self._coordinator.stop()
        self._thread.join()


def _coordinate(coordinator: Coordinator, context: zmq.Context[zmq.Socket[bytes]], folder: IpcFolder) -> None:
    """The task of the proxy's thread."""
    try:
        coordinator.run()
    finally:
        _free(context, folder)


def _free(context: zmq.Context[zmq.Socket[bytes]], folder: IpcFolder) -> None:
    context.term()
    folder.close()


def _make_processes(
    args: LlmArgs, tokenizer: TokenizerSource | None, folder: IpcFolder, context: zmq.Context[zmq.Socket[bytes]]
) -> tuple[list[Replica], list[SupervisedProcess]]:
    config = args.worker_config
    location = None if tokenizer is None else tokenizer.locate(folder.path)
    num_postproc = args.num_postprocess_workers
    replicas: list[Replica] = []
    for index in range(args.num_replicas):
        start = partial(_worker_start, args, replicas, index, None if num_postproc else location)
        replicas.append(Replica(SupervisedProcess("worker", index, config, folder, context, start)))
    postprocs = [
        SupervisedProcess(
            "postproc", index, config, folder, context, lambda: StartPostproc(location, config.heartbeat_interval)
        )
        for index in range(num_postproc)
    ]
    return replicas, postprocs


def _worker_start(
    args: LlmArgs, replicas: list[Replica], index: int, location: TokenizerLocation | None
) -> StartWorker:
    """What the worker `index` is told; one that is started anew takes as much memory as the one before it."""
    known = replicas[index].description
    return StartWorker(
        args=args.model_copy(update={"tokenizer": None}).model_dump_json(exclude_unset=True),
        tokenizer=location,
        num_postproc=args.num_postprocess_workers,
        replica=index,
        cache_tokens=None if known is None else known.memory.cache_tokens,
        heartbeat_interval=args.worker_config.heartbeat_interval,
    )
