"""`GenerationExecutor`: what takes requests, whatever runs them. In-process and multi-process executors are siblings.

    submit(GenerationRequest) -> GenerationResult         one terminal event for each, whatever happens
    abort_request(id)                                     at any time
    shutdown()                                            ends every request, then returns

Sources: the names follow TensorRT-LLM's `GenerationExecutor`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tokenmill.config import LlmArgs
from tokenmill.engine.request import GenerationRequest
from tokenmill.executor.result import GenerationResult
from tokenmill.telemetry.stats import EngineStats
from tokenmill.tokenization import Tokenizer

if TYPE_CHECKING:
    from tokenmill.executor.engine_factory import EngineDescription

ProgressCallback = Callable[[str, int, int], None]
"""Called while an engine starts: (what, done, total), in bytes for weights."""


class GenerationExecutor(ABC):
    """Takes requests and gives results back. Thread-safe."""

    @staticmethod
    def create(
        args: LlmArgs, tokenizer: Tokenizer | None, on_progress: ProgressCallback | None = None
    ) -> GenerationExecutor:
        """Start an executor for `args`; returns when it can take requests.

        Args:
            args: `args.model` must be a local path.
            tokenizer: for text output; None gives token ids only.
            on_progress: called while weights are loaded.

        Raises:
            UserError: the model or a parameter cannot be used.
            OutOfMemoryError: the model or its cache does not fit.
        """
        from tokenmill.executor.engine_factory import build_engine
        from tokenmill.executor.in_process import InProcessExecutor

        engine, description = build_engine(args, on_progress)
        return InProcessExecutor(engine, description, tokenizer, max_queue_size=args.max_queue_size)

    @property
    @abstractmethod
    def description(self) -> EngineDescription:
        """What runs: model, limits, memory plan."""

    @abstractmethod
    def submit(
        self, request: GenerationRequest, *, prompt: str | None = None, streaming: bool = False
    ) -> GenerationResult:
        """Queue a request.

        Args:
            request: `request.request_id` must be fresh: take it from `next_request_id()`.
            prompt: its text, handed through to the output.
            streaming: one output for each step.

        Raises:
            UserError: the request can never run; `field` names why.
            QueueFullError: too many requests wait.
            ExecutorShutdownError: after `shutdown`, or when the engine is dead.
        """

    @abstractmethod
    def next_request_id(self) -> int:
        """A number that no request has had."""

    @abstractmethod
    def abort_request(self, request_id: int) -> bool:
        """Cancel; False when no such request is under way (never an error)."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """A snapshot; reading it changes nothing."""

    @abstractmethod
    def check_health(self) -> None:
        """Raise the error that ended the engine, if one did."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Assert that no cache block or slot is lost (between two steps)."""

    @abstractmethod
    def shutdown(self) -> None:
        """End every request with `ExecutorShutdownError` and free everything. Twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()
