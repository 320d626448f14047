"""`GenerationExecutorWorker`: an engine in a process of its own. Started by the proxy, never by people.

Threads: the main one steps the engine; `requests` takes messages from the proxy; `responses` sends what the engine
gave; `statistics` sends heartbeats. torch is imported here and in no other process.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from functools import partial

from tokenmill.config import LlmArgs
from tokenmill.engine.core import EngineCore
from tokenmill.engine.events import TokenDelta
from tokenmill.errors import ProtocolError
from tokenmill.executor.base_worker import BaseWorker
from tokenmill.executor.child import Child
from tokenmill.executor.description import EngineDescription
from tokenmill.executor.engine_reading import start_reading
from tokenmill.executor.managed_thread import ManagedThread
from tokenmill.executor.messages import (
    Abort,
    CheckIntegrity,
    EngineEvents,
    FinishSequence,
    Heartbeat,
    IntegrityReport,
    PostprocBatch,
    Progress,
    Ready,
    Shutdown,
    StartWorker,
    StepOutputs,
    Submit,
    TokenizerLocation,
    request_codec,
    to_process_codec,
)
from tokenmill.executor.postproc import Ended, Postprocessed, Postprocessor
from tokenmill.outputs import RequestMetrics
from tokenmill.telemetry.stats import EngineStats
from tokenmill.tokenization import Tokenizer, load_tokenizer


class GenerationExecutorWorker(BaseWorker):
    """Owns `engine` and answers the proxy.

    Args:
        engine: owned from now on.
        postprocessor: None: events go to postprocessing workers.
        child: the connection to the proxy.
        start: what the proxy asked for.
        records_requests: whether the engine keeps records of requests.
    """

    def __init__(
        self,
        engine: EngineCore,
        postprocessor: Postprocessor | None,
        child: Child,
        start: StartWorker,
        *,
        records_requests: bool,
    ) -> None:
        super().__init__(engine, postprocessor, replica=start.replica)
        self._child = child
        self._records_requests = records_requests
        self._interval = start.heartbeat_interval
        self._postproc_of: dict[int, int] = {}
        self._request_ids: dict[int, int] = {}  # by attempt, for records of requests
        self._requests = request_codec()
        self._batches = to_process_codec()

    def serve(self) -> None:
        """Take requests until the proxy says `Shutdown`."""
        self._child.run_in_background(self._take_requests, "requests")
        self._child.beat(self._interval, self._heartbeat)
        self.run()

    def deliver(self, result: Postprocessed) -> None:
        self._child.send(StepOutputs(result.outputs, result.ended, stats=self.counters()))

    def deliver_raw(self, deltas: list[TokenDelta], ended: list[Ended]) -> None:
        """Sort a step's events by postprocessing worker."""
        batches: dict[int, PostprocBatch] = {}

        def batch_of(request_id: int) -> PostprocBatch:
            return batches.setdefault(self._postproc_of[request_id], PostprocBatch([], []))

        for delta in deltas:
            batch_of(delta.request_id).deltas.append(delta)
        for one in ended:
            batch_of(one.request_id).ended.append(one)
            del self._postproc_of[one.request_id]
        encoded = [(index, self._batches.encode(batch)) for index, batch in batches.items()]
        self._child.send(EngineEvents(encoded, self.counters()))

    # ---- the other threads -----------------------------------------------------------------------------------

    def _take_requests(self) -> None:
        while True:
            match self._child.receive():
                case Submit() as message:
                    self._take(message)
                case Abort(attempt, reason):
                    self.abort(attempt, reason)
                case FinishSequence(hit):
                    self.finish_sequence(hit.request_id, hit.sequence_index)
                case CheckIntegrity(call):
                    self.call(partial(self._report_integrity, call))
                case Shutdown():
                    self.stop()
                    return
                case message:
                    raise ProtocolError(f"A worker cannot answer {type(message).__name__}.")

    def _take(self, message: Submit) -> None:
        try:
            request = self._requests.decode(message.request)
            request_id, request = request.request_id, replace(request, request_id=message.attempt)
        except ProtocolError as error:
            ended = Ended(message.attempt, RequestMetrics(arrival_time=0.0), error)
            self._child.send(StepOutputs([], [ended]))
            return
        if self._records_requests:
            self._request_ids[message.attempt] = request_id
        if self._postprocessor is None:
            self.call(lambda: self._postproc_of.__setitem__(message.attempt, message.postproc))
        self.submit(request)

    def _report_integrity(self, call: int) -> None:
        problem = None
        try:
            self.check_integrity()
        except AssertionError as error:
            problem = f"{self._child.name}: {error}"
        self._child.send(IntegrityReport(call, problem))

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(self.has_work, self._with_request_ids(self.stats()), self.iterations.get_all())

    def _with_request_ids(self, stats: EngineStats) -> EngineStats:
        """The engine knows attempts; records for callers name requests."""
        if not stats.recent_requests:
            return stats
        records = []
        for step in stats.recent_requests:
            requests = [replace(one, request_id=self._request_ids[one.request_id]) for one in step.requests]
            records.append(replace(step, requests=tuple(requests)))
        oldest = min((one.request_id for one in stats.recent_requests[0].requests), default=0)
        for attempt in [attempt for attempt in list(self._request_ids) if attempt < oldest]:
            del self._request_ids[attempt]
        return replace(stats, recent_requests=tuple(records))


def run_worker(child: Child) -> None:
    """The job of a worker process: build the engine that the proxy asks for, and serve."""
    start = child.receive()
    assert isinstance(start, StartWorker), f"{start} is no start"
    args = LlmArgs(**json.loads(start.args))
    try:
        engine, description, tokenizer = _build(child, start, args)
    except Exception as error:  # whatever a model or a machine raises while it loads is the proxy's to tell
        child.start_failed(error)
        return
    postprocessor = None if start.num_postproc else Postprocessor(tokenizer)
    records_requests = args.stats_config.request_stats_max_iterations > 0
    worker = GenerationExecutorWorker(engine, postprocessor, child, start, records_requests=records_requests)
    child.send(Ready(description))
    worker.serve()


def _build(child: Child, start: StartWorker, args: LlmArgs) -> tuple[EngineCore, EngineDescription, Tokenizer | None]:
    tokenizers: list[Tokenizer] = []
    loading = ManagedThread(
        lambda: tokenizers.append(_load(start.tokenizer)) if start.tokenizer else None,
        name="tokenmill-tokenizer",
        on_error=lambda error: None,
    )
    loading.start()
    read = start_reading(args.model)
    from tokenmill.executor.engine_factory import build_engine  # torch, while tokenizer and engine load

    num_sharing = args.num_replicas if start.cache_tokens is None else 1
    engine, description = build_engine(
        _own_share(start, args),
        lambda what, done, total: child.send(Progress(what, done, total)),
        num_sharing=num_sharing,
        read=read,
    )
    loading.join()
    if loading.error is not None:
        raise loading.error
    return engine, description, tokenizers[0] if tokenizers else None


def _load(location: TokenizerLocation) -> Tokenizer:
    return load_tokenizer(location.path, mode=location.mode)


def _own_share(start: StartWorker, args: LlmArgs) -> LlmArgs:
    """The user's arguments, with what one replica of several takes for itself."""
    if start.cache_tokens is not None:
        cache = args.kv_cache_config.model_copy(update={"max_tokens": start.cache_tokens})
        args = args.model_copy(update={"kv_cache_config": cache})
    num_replicas = args.num_replicas
    if num_replicas == 1:
        return args
    from torch import cuda

    if args.device in ("auto", "cuda") and cuda.device_count() > 1:
        args = args.model_copy(update={"device": f"cuda:{start.replica % cuda.device_count()}"})
    elif args.num_threads is None and (args.device == "cpu" or not cuda.is_available()):
        num_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        num_threads = max(1, num_cores // num_replicas)
        args = args.model_copy(update={"num_threads": num_threads})
    return args
