"""`SupervisedProcess`: one process after another under one name: started, watched, restarted, given up.

Pure bookkeeping around a `ChildProcess`: which state it is in, when it was heard last, when it may be started again.
The coordinator feeds it messages and asks it on every turn what has become of it. Times are the coordinator's clock,
which stands still while the caller's process does: a laptop that sleeps, or a stopped parent, is no stall.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from typing import Final

import zmq

from tokenmill.config import WorkerConfig
from tokenmill.errors import (
    EngineStalledError,
    ProtocolError,
    TokenmillError,
    WorkerDiedError,
    WorkerStartError,
)
from tokenmill.executor.child_process import ChildProcess, ProcessKind
from tokenmill.executor.health import ProcessHealth, ProcessState, StepClock
from tokenmill.executor.ipc import IpcFolder
from tokenmill.executor.messages import (
    PROTOCOL_VERSION,
    FromProcess,
    Heartbeat,
    Hello,
    LogRecord,
    Ready,
    StartFailed,
    ToProcess,
)
from tokenmill.telemetry.stats import EngineStats

logger = logging.getLogger(__name__)

SILENT_SECONDS: Final = 1.7
"""A process that was not heard for so long is not counted on."""
_SERVING: Final = ("ready", "silent", "stalled")  # it has started and is not known to be dead
_STABLE_SECONDS: Final = 10.0  # a process that served for so long is restarted without a wait
_STACK_SECONDS: Final = 1.0


class SupervisedProcess:
    """See the module.

    Args:
        kind: what the process does.
        index: its number among its kind.
        config: limits.
        folder: for sockets and logs.
        context: of ZeroMQ.
        make_start: the message that tells a new process what to do.
    """

    def __init__(
        self,
        kind: ProcessKind,
        index: int,
        config: WorkerConfig,
        folder: IpcFolder,
        context: zmq.Context[zmq.Socket[bytes]],
        make_start: Callable[[], ToProcess],
    ) -> None:
        self.kind = kind
        self.index = index
        self.name = f"{kind}-{index}"
        self.child: ChildProcess | None = None
        self.state: ProcessState = "stopped"
        self.has_work = False
        self.num_deaths = self.num_restarts = self.num_stalls = 0
        self.last_death: TokenmillError | None = None
        self._config = config
        self._folder = folder
        self._context = context
        self._make_start = make_start
        self._since = 0.0  # when the state was entered
        self._heard = 0.0
        self._progressed = 0.0
        self._steps = StepClock()
        self._deaths: deque[float] = deque()
        self._num_quick_deaths = 0
        self._start_error: TokenmillError | None = None

    # ---- life ------------------------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Start a process.

        Raises:
            WorkerStartError: the operating system refuses.
        """
        assert self.child is None
        log_dir = self._config.log_dir or self._folder.path
        log_dir.mkdir(parents=True, exist_ok=True)
        log_file = log_dir / (f"{self.name}.log" if self._config.log_dir is None else f"{self.name}-{os.getpid()}.log")
        self._start_error = None
        self.child = ChildProcess(self.kind, self.name, self.num_deaths, self._folder, log_file, self._context)
        self._enter("starting", now)
        self._heard = now

    def on_message(self, message: FromProcess, now: float) -> None:
        """Take note of what the process says of itself; messages about requests only count as a sign of life.

        Raises:
            ProtocolError: it speaks another version.
        """
        self._heard = now
        match message:
            case Hello(version, _):
                if version != PROTOCOL_VERSION:
                    raise ProtocolError(
                        f"{self.name} speaks version {version} of the protocol, not {PROTOCOL_VERSION}."
                    )
                assert self.child is not None
                self.child.send(self._make_start())
            case Ready():
                self._enter("ready", now)
                self._progressed = now
            case StartFailed(error):
                self._start_error = error
            case Heartbeat(has_work, _, iterations):
                self.has_work = has_work
                for iteration in iterations:
                    self._steps.step_ended(iteration.duration)
            case LogRecord(level, name, text):
                logging.getLogger(name).log(level, "%s", text)
            case _:
                pass

    def send(self, message: ToProcess) -> None:
        """Send to a process that is ready; whatever was meant for one before it is dropped."""
        if self.child is not None and self.state in _SERVING:
            self.child.send(message)

    def send_encoded(self, data: bytes) -> None:
        """The same for an encoded message."""
        if self.child is not None and self.state in _SERVING:
            self.child.send_encoded(data)

    def progressed(self, now: float) -> None:
        """The engine finished a step, or has nothing to do."""
        self._progressed = now

    def check(self, now: float) -> TokenmillError | None:
        """Why the process is dead or must be killed now; None while it is well. Kills nothing yet."""
        if self.child is None:
            return None
        if self._start_error is not None:
            return self._start_error
        if self.child.exit_code is not None:
            return self._exit_error()
        if self.state == "starting":
            if now - self._since > self._config.start_timeout:
                return WorkerStartError(
                    f"{self.name} was not ready within {self._config.start_timeout:g} s.",
                    remedy="Raise worker_config.start_timeout if the model takes longer to load.",
                )
            return None
        self.state = self._living_state(now)
        if now - min(self._heard, self._progressed) > self._config.stall_timeout:
            return self._stall_error()
        return None

    def _living_state(self, now: float) -> ProcessState:
        if now - self._heard > max(SILENT_SECONDS, self._config.heartbeat_interval * 2):
            return "silent"
        return "stalled" if self.has_work and now - self._progressed > self._steps.limit else "ready"

    def _exit_error(self) -> TokenmillError:
        assert self.child is not None
        code = self.child.exit_code
        assert code is not None
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if self.state == "starting":
            return WorkerStartError(f"{self.name} {how} while it started.", remedy="Its log is in the caller's log.")
        return WorkerDiedError(f"The process {self.name}, which ran the request, {how}.", remedy="Try again.")

    def _stall_error(self) -> TokenmillError:
        assert self.child is not None
        self.num_stalls += 1
        stacks = self.child.dump_stacks(_STACK_SECONDS)
        logger.error(
            "%s made no progress for %g s and is restarted. %s",
            self.name,
            self._config.stall_timeout,
            f"Its stacks:\n{stacks}" if stacks else "It gave no stacks: it is stopped, or stuck in the kernel.",
        )
        return EngineStalledError(
            f"The process {self.name}, which ran the request, made no progress for {self._config.stall_timeout:g} s.",
            remedy="Try again.",
        )

    def bury(self, error: TokenmillError, now: float, *, may_restart: bool) -> None:
        """The process is dead, or is killed now: free what it had, and decide when the next one comes."""
        assert self.child is not None
        was_stable = self.state in _SERVING and now - self._since > _STABLE_SECONDS
        self.last_death = error
        self.num_deaths += 1
        self.child.close()
        if self._start_error is None and not isinstance(error, EngineStalledError):
            logger.error("%s The end of its log:\n%s", error.message, self.child.log_tail() or "(empty)")
        self.child = None
        self.has_work = False
        self._num_quick_deaths = 1 if was_stable else self._num_quick_deaths + 1
        self._decide(now, may_restart=may_restart)

    def _decide(self, now: float, *, may_restart: bool) -> None:
        """After a death: restart, or give up?"""
        self._deaths.append(now)
        while now - self._deaths[0] > self._config.restart_window:
            self._deaths.popleft()
        if not may_restart:
            self._enter("stopped", now)
        elif len(self._deaths) > self._config.max_restarts:
            logger.error("%s died %d times in a row and is given up.", self.name, len(self._deaths))
            self._enter("failed", now)
        else:
            self._enter("waiting_to_restart", now)

    def restart_if_due(self, now: float) -> None:
        """Start the next process when the wait after the last one's death is over."""
        if self.state != "waiting_to_restart" or now - self._since < self._backoff():
            return
        self.num_restarts += 1
        try:
            self.start(now)
        except WorkerStartError as error:  # as good as a death
            logger.error("%s", error)
            self.last_death = error
            self._num_quick_deaths += 1
            self._decide(now, may_restart=True)

    def stop(self, now: float) -> None:
        """No process from now on; kills the one that lives."""
        if self.child is not None:
            self.child.close()
            self.child = None
        self._enter("stopped", now)

    def health(self, now: float, last_step_age: float | None, stats: EngineStats | None) -> ProcessHealth:
        """What is known of it, and of its engine."""
        child = self.child
        return ProcessHealth(
            name=self.name,
            state=self.state,
            pid=None if child is None else child.pid,
            heartbeat_age=now - self._heard,
            last_step_age=last_step_age,
            has_work=self.has_work,
            progress_age=now - self._progressed if self.has_work and child is not None else None,
            num_restarts=self.num_restarts,
            stats=stats,
        )

    def _backoff(self) -> float:
        if self._num_quick_deaths <= 1:
            return 0.0
        return min(self._config.restart_backoff * 2.0 ** (self._num_quick_deaths - 2), self._config.restart_backoff_cap)

    def _enter(self, state: ProcessState, now: float) -> None:
        self.state = state
        self._since = now
