"""`Executor`: enqueue requests, await responses. For callers who have token ids and their own event handling.

It stands on `GenerationExecutor`, so tokens, limits and errors are those of `LLM`. Shaped as TensorRT-LLM's
`bindings.executor.Executor`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from datetime import timedelta
from math import isnan
from operator import index
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.errors import (
    ExecutorShutdownError,
    InvalidParameterError,
    TokenmillError,
    UnsupportedFeatureError,
)
from tokenmill.executor.executor import GenerationExecutor
from tokenmill.executor.low_level.executor_config import ExecutorConfig, ModelType
from tokenmill.executor.low_level.request import Request
from tokenmill.executor.low_level.request_conversion import RequestConverter
from tokenmill.executor.low_level.response import Response
from tokenmill.executor.low_level.response_builder import ResponseBuilder
from tokenmill.executor.low_level.response_collector import ResponseCollector
from tokenmill.executor.low_level.response_queue import ResponseQueue
from tokenmill.executor.low_level.statistics import IterationStats, RequestStatsPerIteration
from tokenmill.executor.result import GenerationResult
from tokenmill.program.package import EnginePackage


class Executor:
    """Runs a model for requests of token ids. All methods are thread-safe.

    Args:
        model_path_or_buffer: whatever `LLM` takes as `model`, the directory of a built engine included; or an engine in
            memory, as `Engine.to_buffer` gives it. A buffer is unpacked to a temporary folder, so that weights are
            mapped and worker processes can read them.
        model_type: DECODER_ONLY.
        executor_config: limits and policies; None: the defaults.

    Raises:
        UserError: the model or a parameter cannot be used; `field` names the parameter.
        EngineFileError: an engine is damaged, or was made by another version or for another machine.
        OutOfMemoryError: the model or its cache does not fit.
    """

    def __init__(
        self,
        model_path_or_buffer: str | Path | bytes | bytearray | memoryview,
        model_type: ModelType = ModelType.DECODER_ONLY,
        executor_config: ExecutorConfig | None = None,
    ) -> None:
        _check_model_type(model_type)
        config = _checked_config(executor_config)
        self._config = config
        self._unpacked: TemporaryDirectory[str] | None = None
        try:
            self._executor = GenerationExecutor.create(config.to_llm_args(self._find(model_path_or_buffer)), None)
        except BaseException:
            self._remove_unpacked()
            raise
        description = self._executor.description
        self._num_slots = min(description.max_batch_size, description.max_num_tokens)
        self._converter = RequestConverter(
            vocab_size=description.model.vocab_size,
            end_ids=tuple(description.model.eos_token_ids),
            max_seq_len=description.max_seq_len,
            max_prompt_len=None if config.enable_chunked_context else description.max_num_tokens,
            max_num_sequences=self._num_slots,
        )
        self._queue = ResponseQueue()
        self._collector = ResponseCollector(self._queue)
        weakref.finalize(self, _let_go, os.getpid(), self._collector).atexit = False
        self._admitting = threading.Lock()  # held while requests enter and while all is shut down
        self._reading = threading.Lock()  # guards the two times below
        self._is_shut_down = False
        self._last_iteration_time = self._last_request_time = float("-inf")

    # ---- requests --------------------------------------------------------------------------------------------

    def enqueue_request(self, request: Request) -> int:
        """Queue a request; its responses carry the number that this returns.

        Raises:
            UserError: the request can never run; `field` names why.
            QueueFullError: too many requests wait.
            ExecutorShutdownError: after `shutdown`, or when the engine is dead.
        """
        return self.enqueue_requests([request])[0]

    def enqueue_requests(self, requests: Sequence[Request]) -> list[int]:
        """Queue requests, all or none. See `enqueue_request`."""
        for request in requests:
            if not isinstance(request, Request):
                raise InvalidParameterError(
                    f"A request is of type {type(request).__name__}, not tokenmill.executor.Request.", field="request"
                )
        with self._admitting:
            if self._is_shut_down:
                raise ExecutorShutdownError("The executor is shut down.")
            converted = [self._converter.convert(self._executor.next_request_id(), request) for request in requests]
            results: list[GenerationResult] = []
            try:
                for generation_request, request in zip(converted, requests, strict=True):
                    results.append(self._executor.submit(generation_request, streaming=request.streaming))
            except BaseException:
                for result in results:
                    result.abort()
                raise
            request_ids = [result.request_id for result in results]
            self._queue.open(request_ids)
            for result, request in zip(results, requests, strict=True):
                self._collector.follow(result, self._builder(result.request_id, request))
        return request_ids

    def cancel_request(self, request_id: int) -> bool:
        """End a request: its final response says CANCELLED. False when it had ended already; never an error."""
        return self._executor.abort_request(_as_request_id(request_id))

    def can_enqueue_requests(self) -> bool:
        """Whether a request would be taken now: the executor is up and its queue has room."""
        if self._is_shut_down:
            return False
        try:
            self._executor.check_health()
        except TokenmillError:
            return False
        return self._queue.num_open < self._config.max_queue_size + self._config.max_batch_size

    # ---- responses -------------------------------------------------------------------------------------------

    def await_responses(
        self, timeout: float | timedelta | None = None, request_id: int | Sequence[int] | None = None
    ) -> list[Response]:
        """Wait until there is a response, and take all there are. Those of a request come in order, each once.

        Args:
            timeout: seconds; None waits for ever.
            request_id: only responses of this request, or of any of these.

        Returns:
            Responses; none after `timeout`, or when the requests asked for have given all theirs.

        Raises:
            InvalidParameterError: no request has had such an id, or a parameter is malformed.
            ExecutorShutdownError: `request_id` is None, the executor is shut down, and all responses were given.
        """
        seconds = _as_seconds(timeout)
        if request_id is None:
            return self._queue.take_any(seconds)
        return self._queue.take(_as_request_ids(request_id), seconds)

    def get_num_responses_ready(self, request_id: int | None = None) -> int:
        """Responses that `await_responses` would give now, of one request or of all."""
        return self._queue.num_ready(None if request_id is None else _as_request_id(request_id))

    # ---- state -----------------------------------------------------------------------------------------------

    def get_latest_iteration_stats(self) -> list[IterationStats]:
        """What the iterations since the last call did, at most `iter_stats_max_iterations` of them, oldest first."""
        with self._reading:
            steps = [step for step in self._executor.stats().recent_steps if step.end_time > self._last_iteration_time]
            if steps:
                self._last_iteration_time = steps[-1].end_time
        return [IterationStats.of(step, self._num_slots) for step in steps]

    def get_latest_request_stats(self) -> list[RequestStatsPerIteration]:
        """The requests in the iterations since the last call, at most `request_stats_max_iterations`, oldest first."""
        with self._reading:
            steps = [step for step in self._executor.stats().recent_requests if step.end_time > self._last_request_time]
            if steps:
                self._last_request_time = steps[-1].end_time
        return [RequestStatsPerIteration.of(step) for step in steps]

    def shutdown(self) -> None:
        """End every request with an `ExecutorShutdownError` as its final response, and free the model.

        Responses can still be taken afterwards. Twice is harmless.
        """
        with self._admitting:
            self._is_shut_down = True
            self._executor.shutdown(grace_period=0.0)
            self._collector.close()
            self._queue.close()
            self._remove_unpacked()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _find(self, model: str | Path | bytes | bytearray | memoryview) -> Path:
        """Where the model is; an engine in memory is written to a temporary folder first."""
        if not isinstance(model, (bytes, bytearray, memoryview)):
            return _local_path(model)
        package = EnginePackage.from_buffer(model)
        self._unpacked = TemporaryDirectory(prefix="tokenmill-engine-")
        return package.save(Path(self._unpacked.name) / "engine")

    def _remove_unpacked(self) -> None:
        if self._unpacked is not None:
            self._unpacked.cleanup()

    def _builder(self, request_id: int, request: Request) -> ResponseBuilder:
        return ResponseBuilder(request_id, request, normalize_log_probs=self._config.normalize_log_probs)


def _let_go(process: int, collector: ResponseCollector) -> None:
    """Nobody refers to an executor any more; the engine below ends by itself, after the requests under way."""
    if os.getpid() == process:
        collector.stop()


def _checked_config(config: Any) -> ExecutorConfig:
    """A private copy, so that later changes have no effect."""
    if config is None:
        return ExecutorConfig()
    if not isinstance(config, ExecutorConfig):
        raise InvalidParameterError(
            f"executor_config is of type {type(config).__name__}, not ExecutorConfig.", field="executor_config"
        )
    return config.model_copy(deep=True)


def _check_model_type(model_type: Any) -> None:
    if not isinstance(model_type, ModelType):
        raise InvalidParameterError(f"model_type is {model_type!r}, not a ModelType.", field="model_type")
    if model_type is not ModelType.DECODER_ONLY:
        raise UnsupportedFeatureError(
            f"model_type={model_type.name}: this version runs decoder-only models.",
            field="model_type",
            remedy="Use ModelType.DECODER_ONLY with a decoder-only model.",
        )


def _local_path(model: Any) -> Path:
    """Where the model is; it is downloaded if need be."""
    if not isinstance(model, (str, Path)):
        raise InvalidParameterError(
            f"model_path_or_buffer is of type {type(model).__name__}, not a path or name.", field="model_path_or_buffer"
        )
    return resolve_model(model, field="model_path_or_buffer")


def _as_seconds(timeout: Any) -> float | None:
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or isnan(seconds) or seconds < 0:
        raise InvalidParameterError(f"timeout is {timeout!r}, not seconds (0 or more) or a timedelta.", field="timeout")
    return float(min(seconds, threading.TIMEOUT_MAX))


def _as_request_id(request_id: Any) -> int:
    try:
        if not isinstance(request_id, bool):
            return index(request_id)
    except TypeError:
        pass
    raise InvalidParameterError(f"request_id is of type {type(request_id).__name__}, not int.", field="request_id")


def _as_request_ids(request_id: Any) -> list[int]:
    if not isinstance(request_id, (list, tuple, set, frozenset)):
        return [_as_request_id(request_id)]
    if not request_id:
        raise InvalidParameterError("request_id is empty.", field="request_id", remedy="Pass None for any request.")
    return list(dict.fromkeys(map(_as_request_id, request_id)))
