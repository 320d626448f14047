"""Every error that tokenmill raises on purpose, in one tree.

    TokenmillError
      UserError                      the caller can mend it; also a ValueError
        InvalidParameterError        a value is out of range or of the wrong type
        UnknownParameterError        a name is not a parameter (with did-you-mean)
        UnsupportedFeatureError      a known parameter asks for what this version cannot do
        PromptTooLongError           the prompt does not fit the model's context
        RequestTooLargeError         the request can never fit the KV cache
        AllTokensBannedError         the request allows no token of the vocabulary
        ModelNotFoundError           no such model
        CheckpointError              a checkpoint file is damaged, incomplete or of the wrong kind
        EngineFileError              a built engine is damaged, incomplete, or made for another version or machine
      ExecutorError                  the layer between callers and engines
        QueueFullError               too many requests wait; try again later
        RateLimitError               a client sends more requests than it may
        RequestTimeoutError          the request's deadline passed
        RequestCancelledError        the request was cancelled
        ExecutorShutdownError        the executor is shut down
        WorkerStartError             a worker process could not be started
        WorkerDiedError              the process that ran the request died, or none is left to run it
        ProtocolError                a message between processes is malformed or of another version
      EngineError                    the engine failed while it ran the request
        InvalidLogitsError           the model produced NaN or infinite logits
        EngineStalledError           the engine made no progress and was restarted
      SystemFault                    the machine under us
        OutOfMemoryError             not enough memory on the device
        DeviceFaultError             the device failed; the engine cannot go on

Each class has a stable `code` and the HTTP status that it maps to. An error carries the `field` at fault (a parameter's
name as the caller wrote it) and a `remedy`, and survives a trip through `to_dict` / `from_dict`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar


class TokenmillError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what went wrong, one sentence, with the offending value.
        field: the parameter at fault, as the caller knows it; None if there is none.
        remedy: what the caller can do about it; appended to the text of the error.
    """

    code: ClassVar[str] = "tokenmill_error"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, field: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}" if self.remedy else self.message

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` turns back into an equal error of the same class."""
        return {"code": self.code, "message": self.message, "field": self.field, "remedy": self.remedy}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> TokenmillError:
        """The error that `to_dict` described; an unknown code becomes a plain `TokenmillError`."""
        error_class = _error_classes().get(data["code"], TokenmillError)
        return error_class(data["message"], field=data.get("field"), remedy=data.get("remedy"))


class UserError(TokenmillError, ValueError):
    """The caller can mend it."""

    code = "invalid_request"
    http_status = 400


class InvalidParameterError(UserError):
    """A value is out of range or of the wrong type."""

    code = "invalid_parameter"


class UnknownParameterError(UserError):
    """A name is not a parameter."""

    code = "unknown_parameter"


class UnsupportedFeatureError(UserError):
    """A known parameter asks for something that this version cannot do."""

    code = "unsupported_feature"


class PromptTooLongError(UserError):
    """The prompt leaves no room in the model's context."""

    code = "context_length_exceeded"


class RequestTooLargeError(UserError):
    """The request can never fit, even alone."""

    code = "request_too_large"


class AllTokensBannedError(UserError):
    """The request bans every token that could come next: from its start, or at a place that its answer has reached."""

    code = "all_tokens_banned"


class ModelNotFoundError(UserError):
    """No model under this name or path."""

    code = "model_not_found"
    http_status = 404


class CheckpointError(UserError):
    """A checkpoint file is damaged, incomplete or of the wrong kind."""

    code = "invalid_checkpoint"


class EngineFileError(UserError):
    """A built engine is damaged, incomplete, or made by another version or for another machine."""

    code = "invalid_engine"


class ExecutorError(TokenmillError):
    """The layer between callers and engines."""

    code = "executor_error"
    http_status = 503


class QueueFullError(ExecutorError):
    """Too many requests wait already."""

    code = "queue_full"
    http_status = 429


class RateLimitError(ExecutorError):
    """A client sends more requests than it may."""

    code = "rate_limit_exceeded"
    http_status = 429


class RequestTimeoutError(ExecutorError):
    """The request's deadline passed."""

    code = "request_timeout"
    http_status = 504


class RequestCancelledError(ExecutorError):
    """The request was cancelled before it finished."""

    code = "request_cancelled"
    http_status = 499


class ExecutorShutdownError(ExecutorError):
    """The executor is shut down and takes no more requests."""

    code = "executor_shutdown"


class WorkerStartError(ExecutorError):
    """A worker process could not be started."""

    code = "worker_start_failed"


class WorkerDiedError(ExecutorError):
    """The process that ran the request died when part of the answer had been handed out, or no process is left."""

    code = "worker_died"


class ProtocolError(ExecutorError):
    """A message between processes is malformed, partial or of another version of the protocol."""

    code = "protocol_error"
    http_status = 500


class EngineError(TokenmillError):
    """The engine failed while it ran the request."""

    code = "engine_error"


class InvalidLogitsError(EngineError):
    """The model produced NaN or infinite logits for the request."""

    code = "invalid_logits"


class EngineStalledError(EngineError):
    """The engine made no progress for too long and was restarted."""

    code = "engine_stalled"
    http_status = 503


class SystemFault(TokenmillError):
    """The machine under us failed."""

    code = "system_fault"


class OutOfMemoryError(SystemFault):
    """Not enough memory on the device."""

    code = "out_of_memory"
    http_status = 503


class DeviceFaultError(SystemFault):
    """The device failed in a way that ends the engine, such as an illegal memory access."""

    code = "device_fault"
    http_status = 503


def _error_classes() -> dict[str, type[TokenmillError]]:
    found: dict[str, type[TokenmillError]] = {}
    pending: list[type[TokenmillError]] = [TokenmillError]
    while pending:
        error_class = pending.pop()
        found[error_class.code] = error_class
        pending.extend(error_class.__subclasses__())
    return found


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the closest known one, or the list of all."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Known names: {', '.join(names)}."
