"""`GenerationExecutor`: what takes requests, whatever runs them. In-process and multi-process executors are siblings.

    submit(GenerationRequest) -> GenerationResult         one terminal event for each, whatever happens
    generate_async(prompt, sampling_params)               the same from text or token ids
    abort_request(id)                                     at any time
    shutdown(grace_period)                                lets running requests finish, ends the rest, then returns

What executors have in common is here: checks at the door, the table of open requests, deadlines, the order of a
shutdown. What differs is in the methods that start with an underscore and are abstract.

An executor is a handle: callers and the requests under way refer to it, its threads do not. When the last of those
references is gone its thread is told to end, and does what is heavy itself: a reference can go anywhere, inside the
garbage collector and on any thread, with any lock held.

Sources: the names follow TensorRT-LLM's `GenerationExecutor`.
"""

from __future__ import annotations

import atexit
import itertools
import os
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tokenmill.config import LlmArgs
from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.validation import check_bans, check_request, check_token_ids
from tokenmill.errors import (
    EngineStalledError,
    ExecutorShutdownError,
    InvalidParameterError,
    QueueFullError,
    RequestTimeoutError,
    WorkerDiedError,
)
from tokenmill.executor.deadlines import DeadlineTimer
from tokenmill.executor.description import EngineDescription
from tokenmill.executor.engine_reading import start_reading
from tokenmill.executor.health import ExecutorHealth
from tokenmill.executor.iteration_queue import IterationResultQueue
from tokenmill.executor.managed_thread import ManagedThread, join_ending
from tokenmill.executor.request_table import RequestTable
from tokenmill.executor.result import GenerationResult
from tokenmill.executor.spinning import limit_spinning
from tokenmill.executor.tokenizer_source import TokenizerSource
from tokenmill.inputs import InputProcessor, PromptInput
from tokenmill.outputs import FinishReason
from tokenmill.sampling_params import SamplingParams
from tokenmill.strict_model import is_number, shown
from tokenmill.telemetry.stats import EngineStats, IterationStats

HURRY_SECONDS: Final = 2.0
"""How long the end waits for a step when somebody waits for the end: after Ctrl-C and when the process ends."""

_ENDING_SECONDS: Final = 10.0
"""How long those are waited for that end because nobody refers to them; they have no request, so it is not long."""

ProgressCallback = Callable[[str, int, int], None]
"""Called while an engine starts: (what, done, total), in bytes for weights."""


class GenerationExecutor(ABC):
    """Takes requests and gives results back. Thread-safe.

    It ends with `shutdown`, with the interpreter, or, without being waited for, when nobody refers to it any more; a
    request under way does.

    Args:
        tokenizer: for text prompts and text output; None: token ids in, token ids out.
        max_requests: most requests that may be under way or wait.
        grace_period: seconds that running requests get at shutdown, if the caller of `shutdown` does not say.
    """

    def __init__(self, tokenizer: TokenizerSource | None, *, max_requests: int, grace_period: float) -> None:
        self._tokenizer = tokenizer
        self._grace_period = grace_period
        self._process = os.getpid()
        self._table = RequestTable(max_requests)
        self._deadlines = DeadlineTimer(self._table, _if_alive(self._expire), self._table.fail)
        self._request_ids = itertools.count(1)
        self._iterations = IterationResultQueue()

    @staticmethod
    def create(
        args: LlmArgs, tokenizer: TokenizerSource | None = None, on_progress: ProgressCallback | None = None
    ) -> GenerationExecutor:
        """Start an executor for `args`; returns when it can take requests.

        Args:
            args: `args.model` must be a local path. `args.num_replicas` chooses: 0 runs the engine in this process,
                more in as many worker processes.
            tokenizer: for text; None gives token ids only.
            on_progress: called while weights are loaded, on any thread.

        Raises:
            UserError: the model or a parameter cannot be used.
            OutOfMemoryError: the model or its cache does not fit.
            WorkerStartError: a worker process died while it started, or took too long.
        """
        join_ending(_ENDING_SECONDS)  # of executors that were dropped just now: their memory is free afterwards
        if args.num_replicas:
            from tokenmill.executor.proxy import GenerationExecutorProxy

            return GenerationExecutorProxy(args, tokenizer, on_progress)
        limit_spinning(os.environ)
        read = start_reading(args.model)
        from tokenmill.executor.engine_factory import build_engine  # torch, while the engine is read
        from tokenmill.executor.in_process import InProcessExecutor

        return InProcessExecutor(
            partial(build_engine, args, read=read),
            tokenizer,
            max_requests=args.max_queue_size + args.max_batch_size,
            grace_period=args.worker_config.grace_period,
            on_progress=on_progress,
        )

    @staticmethod
    def save_engine(args: LlmArgs, description: EngineDescription, path: Path) -> Path:
        """Write the engine that runs `args`, as `description` says, to the directory `path`.

        Raises:
            InvalidParameterError: something else is there, or nothing can be written there.
        """
        from tokenmill.executor.engine_source import saved_engine

        return saved_engine(args, description, path)

    # ---- requests --------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def description(self) -> EngineDescription:
        """What runs: model, limits, memory plan."""

    @cached_property
    def inputs(self) -> InputProcessor:
        """Makes requests from prompts."""
        tokenizer = None if self._tokenizer is None else self._tokenizer.load()
        return InputProcessor(tokenizer, self.description.model)

    def next_request_id(self) -> int:
        """A number that no request has had."""
        return next(self._request_ids)

    def submit(
        self,
        request: GenerationRequest,
        *,
        prompt: str | None = None,
        streaming: bool = False,
        timeout: float | None = None,
    ) -> GenerationResult:
        """Queue a request.

        Args:
            request: `request.request_id` must be fresh: take it from `next_request_id()`.
            prompt: its text, handed through to the output.
            streaming: one output for each step.
            timeout: seconds from now, after which it ends with `RequestTimeoutError`; None: none.

        Raises:
            UserError: the request can never run; `field` names why.
            QueueFullError: too many requests wait.
            ExecutorShutdownError: after `shutdown`.
            EngineError, WorkerDiedError: nothing is left that could run it.
        """
        _check_timeout(timeout)
        check_request(request, self.description, self.description, self._table)
        check_token_ids(request, self.description.model.vocab_size)
        check_bans(request, self.description.model.vocab_size)
        enqueue = self._prepare(replace(request, streaming=streaming))
        result = self._table.open(request, prompt, streaming=streaming, abort=self.abort_request)
        if timeout is not None:
            self._deadlines.add(request.request_id, time.monotonic() + timeout)
        enqueue()
        return result

    def generate_async(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        priority: float = 0.5,
        timeout: float | None = None,
    ) -> GenerationResult:
        """Make a request of a prompt and queue it.

        Args:
            prompt: text, token ids, a dictionary or a conversation.
            sampling_params: None: greedy, 32 tokens.
            streaming, timeout: as in `submit`.
            priority: for the priority queue; higher runs first.

        Raises:
            As `submit`.
        """
        sampling = SamplingParams() if sampling_params is None else sampling_params
        request, text = self.inputs.make_request(self.next_request_id(), prompt, sampling, priority)
        return self.submit(request, prompt=text, streaming=streaming, timeout=timeout)

    def abort_request(self, request_id: int) -> bool:
        """Cancel; False when no such request is under way (never an error)."""
        if request_id not in self._table:
            return False
        self._cancel(request_id, "cancelled")
        return True

    # ---- state -----------------------------------------------------------------------------------------------

    @abstractmethod
    def stats(self) -> EngineStats:
        """A snapshot of all engines together; reading it changes nothing and never waits."""

    @abstractmethod
    def health(self) -> ExecutorHealth:
        """What is known about the engines at this moment; never waits."""

    def get_iteration_stats(self, timeout: float = 0.0) -> list[IterationStats]:
        """Records of the engines' steps since the last call, oldest first; the oldest of too many are dropped.

        Args:
            timeout: seconds to wait for the first.
        """
        return self._iterations.get_all(timeout)

    def check_health(self) -> None:
        """Do nothing while requests can be run.

        Raises:
            ExecutorShutdownError: after `shutdown`.
            EngineError, WorkerDiedError: why none can, for now or for good.
        """
        if self._table.closed_by is not None:
            raise copy(self._table.closed_by)
        health = self.health()
        if health.state == "unhealthy":
            hangs = any(process.state in ("silent", "stalled") for process in health.processes)
            error_class = EngineStalledError if hangs else WorkerDiedError
            raise error_class(
                f"No request can be run now: {health.message.removesuffix('.')}.", remedy="Try again later."
            )

    def check_ready(self) -> None:
        """Do nothing while requests are taken.

        Raises:
            QueueFullError: too many requests wait.
            TokenmillError: as `check_health`.
        """
        self.check_health()
        if self._table.is_full:
            raise QueueFullError("Too many requests are under way.", remedy="Try again later.")

    @abstractmethod
    def check_integrity(self) -> None:
        """Assert that no cache block or slot is lost (between two steps)."""

    def shutdown(self, grace_period: float | None = None) -> None:
        """End: no more requests are taken, running ones may finish, the rest end with `ExecutorShutdownError`.

        Args:
            grace_period: seconds that running requests get; None: what the configuration says. A second call, from any
                thread, waits for the end too; with 0 it cuts the first one's grace short.
        """
        self._end(self._grace_period if grace_period is None else grace_period, None)

    def _end(self, grace_period: float, patience: float | None) -> None:
        if self._process != os.getpid():
            return  # a fork of the caller's process ends; nothing here is its own
        error = ExecutorShutdownError("The executor is shut down.")
        self._table.close(error)
        if grace_period > 0.0:
            self._table.wait_until_idle(grace_period)
        for request_id in self._table.finish_all(error):
            self._cancel(request_id, "cancelled")
        self._stop(patience)
        self._deadlines.close()
        atexit.unregister(self._at_exit)

    def _own_thread(
        self,
        task: Callable[[], None],
        stop: Callable[[], None],
        *,
        name: str,
        on_error: Callable[[Exception], None],
    ) -> ManagedThread:
        """The thread that owns what runs requests. To be called once; nothing that it is given may refer to `self`.

        Args:
            task: ends after `stop`, and frees what it owns.
            stop: called at shutdown, and when nobody refers to this executor any more: on any thread, at any place in
                any code. It neither waits nor takes a lock that is not reentrant.
            name, on_error: as for `ManagedThread`.
        """
        close_deadlines = self._deadlines.close

        def run() -> None:
            try:
                task()
            finally:
                close_deadlines()
                atexit.unregister(at_exit)

        thread = ManagedThread(run, name=name, on_error=on_error)
        self._at_exit = at_exit = partial(_end_with_interpreter, weakref.ref(self), thread)
        atexit.register(at_exit)
        weakref.finalize(self, _let_go, self._process, thread, stop).atexit = False
        return thread

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is None:
            self.shutdown()
        else:
            self._end(0.0, HURRY_SECONDS)

    # ---- what differs ----------------------------------------------------------------------------------------

    @abstractmethod
    def _prepare(self, request: GenerationRequest) -> Callable[[], None]:
        """Do what can fail before the request is taken; returns what hands it to the engines, which cannot."""

    @abstractmethod
    def _cancel(self, request_id: int, reason: FinishReason) -> None:
        """End a request in its engine, if it is there; if it is still open, its terminal event comes soon."""

    @abstractmethod
    def _stop(self, patience: float | None) -> None:
        """End threads and processes, and wait for their end. All requests have ended. Twice is harmless.

        Args:
            patience: seconds to wait at the most for a step that is under way; None: as long as it takes.
        """

    def _expire(self, request_id: int) -> None:
        """A deadline has passed; the request may have ended before."""
        if self._table.finish(request_id, RequestTimeoutError("The request's deadline passed.")):
            self._cancel(request_id, "timeout")


def _if_alive(method: Callable[[int], None]) -> Callable[[int], None]:
    """The same without a reference to the method's owner; nothing once that is gone."""
    reference = weakref.WeakMethod(method)

    def call(request_id: int) -> None:
        alive = reference()
        if alive is not None:
            alive(request_id)

    return call


def _let_go(process: int, thread: ManagedThread, stop: Callable[[], None]) -> None:
    """Nobody refers to an executor any more. In a fork of its process its thread does not exist."""
    if os.getpid() == process:
        thread.is_told_to_end()
        stop()


def _end_with_interpreter(executor: weakref.ref[GenerationExecutor], thread: ManagedThread) -> None:
    """At the interpreter's end. A thread that is still at work when it is gone can bring the process down, so one that
    is ending because its executor is gone is waited for, too."""
    alive = executor()
    if alive is None:
        thread.join(_ENDING_SECONDS)
    else:
        alive._end(0.0, HURRY_SECONDS)


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and not (is_number(timeout) and timeout > 0):
        raise InvalidParameterError(
            f"timeout is {shown(timeout)}, not a number of seconds above 0.",
            field="timeout",
            remedy="Leave it out for none.",
        )
