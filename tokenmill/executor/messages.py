"""The messages between the proxy and its processes. All are plain data; `wire` turns them into bytes.

    proxy -> worker       StartWorker, then Submit, Abort, FinishSequence, CheckIntegrity, Shutdown
    worker -> proxy       Hello, Progress, Ready or StartFailed, then StepOutputs or EngineEvents, Heartbeat, ...
    proxy -> postproc     StartPostproc, then OpenRequest, PostprocBatch, Forget, Shutdown
    postproc -> proxy     Hello, Ready or StartFailed, then StepOutputs, Heartbeat

A request is known to processes by the number of its attempt: a second attempt has another number, so whatever a dead
worker left behind is told from what the next one says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec

from tokenmill.engine.events import TokenDelta
from tokenmill.engine.request import GenerationRequest
from tokenmill.errors import TokenmillError
from tokenmill.executor.description import EngineDescription
from tokenmill.executor.postproc import Ended, OutputDelta, StopHit
from tokenmill.executor.wire import Codec
from tokenmill.outputs import FinishReason
from tokenmill.sampling_params import SamplingParams
from tokenmill.telemetry.stats import EngineStats, IterationStats

PROTOCOL_VERSION: Final = 1
"""Changes with any message; two processes of different versions do not talk to each other."""


class _Message(msgspec.Struct, array_like=True, tag=True):
    """Base of all messages: a list on the wire, the class's name first."""


# ---- lifecycle, both kinds of process ------------------------------------------------------------------------------


class Hello(_Message):
    """The first message of a process.

    Args:
        protocol_version: `PROTOCOL_VERSION` of its code.
        pid: its process id.
    """

    protocol_version: int
    pid: int


class TokenizerLocation(msgspec.Struct, frozen=True, array_like=True):
    """Where a process finds the tokenizer.

    Args:
        path: a directory or file.
        mode: as `LlmArgs.tokenizer_mode`.
    """

    path: Path
    mode: Literal["auto", "slow"]


class StartWorker(_Message):
    """What a worker needs to build its engine.

    Args:
        args: `LlmArgs` as JSON.
        tokenizer: to turn tokens into text; None: token ids only, or postprocessing workers do it.
        num_postproc: postprocessing workers; with 0 the worker sends text, else events for them.
        replica: the worker's number.
        cache_tokens: size of the KV cache if it is known from an earlier start, in tokens.
        heartbeat_interval: seconds.
    """

    args: str
    tokenizer: TokenizerLocation | None
    num_postproc: int
    replica: int
    cache_tokens: int | None
    heartbeat_interval: float


class StartPostproc(_Message):
    """What a postprocessing worker needs.

    Args:
        tokenizer: None: token ids only.
        heartbeat_interval: seconds.
    """

    tokenizer: TokenizerLocation | None
    heartbeat_interval: float


class Progress(_Message):
    """A start goes on; as the arguments of a progress callback."""

    what: str
    done: int
    total: int


class Ready(_Message):
    """Requests can come.

    Args:
        description: of a worker's engine.
    """

    description: EngineDescription | None


class StartFailed(_Message):
    """The process cannot start, and ends."""

    error: TokenmillError


class Heartbeat(_Message):
    """The process is alive.

    Args:
        has_work: whether requests are under way in it.
        stats: of a worker's engine.
        iterations: records of the engine's steps since the last heartbeat.
    """

    has_work: bool
    stats: EngineStats | None = None
    iterations: list[IterationStats] = []


class LogRecord(_Message):
    """Something to log in the caller's process: level, logger and text as in `logging`."""

    level: int
    logger: str
    text: str


class Shutdown(_Message):
    """End now."""


# ---- requests --------------------------------------------------------------------------------------------------------


class Submit(_Message):
    """Run a request.

    Args:
        attempt: the number under which the request is known to the processes.
        request: a `GenerationRequest`, encoded by whoever took it from the caller.
        postproc: which postprocessing worker its events are for.
    """

    attempt: int
    request: msgspec.Raw
    postproc: int = 0


class Abort(_Message):
    """End an attempt."""

    attempt: int
    reason: FinishReason


class FinishSequence(_Message):
    """End one sequence: its text has a stop string."""

    hit: StopHit


class CheckIntegrity(_Message):
    """Check that nothing is lost; answered with `IntegrityReport` of the same number."""

    call: int


class IntegrityReport(_Message):
    """What `CheckIntegrity` found; None: all is well."""

    call: int
    problem: str | None


# ---- answers ---------------------------------------------------------------------------------------------------------


class StepOutputs(_Message):
    """What a step gave, ready for callers.

    Args:
        outputs: (attempt, what is new), in order.
        ended: attempts that ended; after all of `outputs`.
        stop_hits: sequences that the engine has to be told to end (from postprocessing workers only).
        stats: of the worker's engine after the step.
    """

    outputs: list[tuple[int, OutputDelta]]
    ended: list[Ended]
    stop_hits: list[StopHit] = []
    stats: EngineStats | None = None


class EngineEvents(_Message):
    """What a step gave, for postprocessing workers. The proxy passes the batches on without reading them.

    Args:
        batches: (which postprocessing worker, an encoded `PostprocBatch`).
        stats: of the worker's engine after the step.
    """

    batches: list[tuple[int, bytes]]
    stats: EngineStats


class PostprocBatch(_Message):
    """A step's events for one postprocessing worker; `ended` come after all of `deltas`."""

    deltas: list[TokenDelta]
    ended: list[Ended]


class OpenRequest(_Message):
    """An attempt whose events will come."""

    attempt: int
    sampling: SamplingParams
    prompt_token_ids: tuple[int, ...]


class Forget(_Message):
    """An attempt of which nothing more will come."""

    attempt: int


ToWorker: TypeAlias = StartWorker | Submit | Abort | FinishSequence | CheckIntegrity | Shutdown
FromWorker: TypeAlias = (
    Hello | Progress | Ready | StartFailed | Heartbeat | LogRecord | IntegrityReport | StepOutputs | EngineEvents
)
ToPostproc: TypeAlias = StartPostproc | OpenRequest | PostprocBatch | Forget | Shutdown
FromPostproc: TypeAlias = Hello | Ready | StartFailed | Heartbeat | LogRecord | StepOutputs
FromProcess: TypeAlias = FromWorker | FromPostproc
ToProcess: TypeAlias = ToWorker | ToPostproc


def request_codec() -> Codec[GenerationRequest]:
    """For the request in `Submit`."""
    return Codec(GenerationRequest)


def from_process_codec() -> Codec[FromProcess]:
    """For what processes send."""
    return Codec(FromProcess)


def to_process_codec() -> Codec[ToProcess]:
    """For what the proxy sends."""
    return Codec(ToProcess)
