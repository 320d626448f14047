"""`ChildProcess`: one process that the proxy started, with the queues to and from it. `Child` is its own side.

The process is a fresh interpreter, not a copy of the caller's: it imports nothing of the user's script, so a script
needs no `if __name__ == "__main__"`, and no thread or lock of the caller is inherited.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, TypeAlias

import zmq

from tokenmill.errors import WorkerStartError
from tokenmill.executor.ipc import IpcFolder, IpcQueue
from tokenmill.executor.messages import FromProcess, ToProcess, from_process_codec, to_process_codec
from tokenmill.executor.spinning import limit_spinning

ProcessKind: TypeAlias = Literal["worker", "postproc"]

_MAX_MESSAGES_AT_ONCE: Final = 200
_LOG_TAIL_BYTES: Final = 16_384


class ChildProcess:
    """Starts a process. All methods are called on one thread, which must live as long as the process: on Linux the
    kernel ends a child with the thread that started it.

    Args:
        kind: what it does.
        name: for logs; with `generation` it makes addresses unique.
        generation: how many processes of the name there were before.
        folder: for sockets.
        log_file: where its output goes.
        context: of ZeroMQ.

    Raises:
        WorkerStartError: the operating system refuses.
    """

    def __init__(
        self,
        kind: ProcessKind,
        name: str,
        generation: int,
        folder: IpcFolder,
        log_file: Path,
        context: zmq.Context[zmq.Socket[bytes]],
    ) -> None:
        self._log_file = log_file
        self._codec = to_process_codec()
        self._outbox: deque[bytes] = deque()
        address = folder.address(f"{name}-{generation}")
        self._to: IpcQueue[ToProcess] = IpcQueue(f"{address}.in", self._codec, "send", bind=True, context=context)
        self._from: IpcQueue[FromProcess] = IpcQueue(
            f"{address}.out", from_process_codec(), "receive", bind=True, context=context
        )
        try:
            self._process = _spawn([kind, name, str(os.getpid()), self._from.address, self._to.address], log_file)
        except OSError as error:
            self._close_queues()
            raise WorkerStartError(f"The process {name} cannot be started: {error}.") from error
        self._pidfd = _open_pidfd(self.pid)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it lives; minus the signal's number if a signal ended it."""
        return self._process.poll()

    @property
    def sources(self) -> tuple[zmq.Socket[bytes] | int, ...]:
        """What to poll: readable when a message has come or the process has ended."""
        return (self._from.socket,) if self._pidfd is None else (self._from.socket, self._pidfd)

    @property
    def sink(self) -> zmq.Socket[bytes]:
        """What to poll while it is congested: writable when messages can be sent again."""
        return self._to.socket

    # ---- messages --------------------------------------------------------------------------------------------

    @property
    def is_congested(self) -> bool:
        """Whether messages wait here because the process does not take them."""
        return bool(self._outbox)

    def send(self, message: ToProcess) -> None:
        """Send, or keep until `flush`."""
        self.send_encoded(self._codec.encode(message))

    def send_encoded(self, data: bytes) -> None:
        """Send an encoded message, or keep it until `flush`."""
        self._outbox.append(data)
        self.flush()

    def flush(self) -> None:
        """Send what waits here, as far as there is room."""
        try:
            while self._outbox:
                self._to.put_encoded(self._outbox[0])
                self._outbox.popleft()
        except queue.Full:
            return

    def receive(self, timeout: float = 0.0) -> Iterator[FromProcess]:
        """Messages that have come, but not more than some hundred.

        Args:
            timeout: seconds to wait for each.

        Raises:
            ProtocolError: one cannot be read.
        """
        for _ in range(_MAX_MESSAGES_AT_ONCE):
            try:
                yield self._from.get(timeout)
            except queue.Empty:
                return

    # ---- end -------------------------------------------------------------------------------------------------

    def dump_stacks(self, timeout: float) -> str:
        """Stacks of all its threads; empty if it does not give them within `timeout` seconds (a stopped process)."""
        before = self._log_size()
        try:
            self._process.send_signal(signal.SIGUSR1)
        except OSError:
            return ""
        deadline = time.monotonic() + timeout
        size = before
        while time.monotonic() < deadline:
            time.sleep(0.02)
            last_size, size = size, self._log_size()
            if last_size == size > before:
                break
        with self._log_file.open("rb") as file:
            file.seek(before)
            return file.read().decode(errors="replace")

    def log_tail(self) -> str:
        """The end of its log."""
        with self._log_file.open("rb") as file:
            file.seek(max(0, self._log_size() - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").strip()

    def wait(self, timeout: float) -> bool:
        """Wait for its end; False if it has not come in time."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """End the process if it lives, without mercy, and free everything. Twice is harmless."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        self._close_queues()

    def _close_queues(self) -> None:
        self._to.close()
        self._from.close()

    def _log_size(self) -> int:
        return self._log_file.stat().st_size


def _open_pidfd(pid: int) -> int | None:
    """Something to poll that tells of the process's end at once; None where the system has no such thing."""
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # an old or a restricted kernel; the end is then noticed a fraction of a second later
        return None


def _spawn(arguments: list[str], log_file: Path) -> subprocess.Popen[bytes]:
    """A fresh interpreter that finds the same modules as this one. Its stdin is a pipe to this process that ends with
    it, and nothing else is inherited."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}  # noqa: PTH109
    limit_spinning(environment)
    # -P: without it `-m` would put the working folder first, where a file may be called `queue.py`.
    command = [sys.executable, "-P", "-m", "tokenmill.executor", *arguments]
    with log_file.open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
