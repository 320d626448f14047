"""`Child`: what every process that a proxy started does, whatever its job: die with its parent, leave signals to it,
be able to show its stacks, say hello, report what it logs. `ChildProcess` is the proxy's side of it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Final

from tokenmill.errors import EngineError, TokenmillError
from tokenmill.executor.ipc import IpcQueue
from tokenmill.executor.managed_thread import ManagedThread
from tokenmill.executor.messages import (
    PROTOCOL_VERSION,
    FromProcess,
    Heartbeat,
    Hello,
    LogRecord,
    StartFailed,
    ToProcess,
    from_process_codec,
    to_process_codec,
)

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1
_MAX_WAITING: Final = 1000  # messages that were not sent yet; more make the engine wait
_EXIT_FAILED: Final = 70


class Child:
    """The process's connection to its proxy.

    Args:
        name: of the process, for logs.
        parent_pid: the proxy's process.
        send_address, receive_address: where the proxy listens.
    """

    def __init__(self, name: str, parent_pid: int, send_address: str, receive_address: str) -> None:
        self.name = name
        _leave_signals_to_parent()
        _show_stacks_on_request()
        _die_with_parent(parent_pid)
        self._outgoing: queue.Queue[FromProcess | None] = queue.Queue(_MAX_WAITING)
        self._send_queue: IpcQueue[FromProcess] = IpcQueue(send_address, from_process_codec(), "send", bind=False)
        self._receive_queue: IpcQueue[ToProcess] = IpcQueue(receive_address, to_process_codec(), "receive", bind=False)
        self._sender = ManagedThread(self._send_all, name="tokenmill-responses", on_error=self.fail)
        self._threads: list[ManagedThread] = []

    def run(self, task: Callable[[Child], None]) -> None:
        """Say hello, do the process's job, end the process."""
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger().addHandler(_Reporter(self))
        self._sender.start()
        self.send(Hello(PROTOCOL_VERSION, os.getpid()))
        try:
            task(self)
        except Exception as error:  # the process's boundary
            logger.exception("%s ended with an error.", self.name)
            self.fail(error)
        self._outgoing.put(None)
        self._sender.join(1.0)
        self._end(0)

    def send(self, message: FromProcess) -> None:
        """Send a message, from any thread; waits while too many wait already."""
        self._outgoing.put(message)

    def receive(self) -> ToProcess:
        """The next message. On one thread at a time.

        Raises:
            ProtocolError: it cannot be read.
        """
        return self._receive_queue.get()

    def start_failed(self, error: Exception) -> None:
        """Tell the proxy why the process cannot start."""
        if not isinstance(error, TokenmillError):
            logger.exception("%s cannot start.", self.name)
            error = EngineError(f"The engine could not be built: {type(error).__name__}: {error}.")
        self.send(StartFailed(error))

    def run_in_background(self, task: Callable[[], None], name: str) -> None:
        """Run `task` on a thread; if it raises, the process ends, and the proxy starts another."""
        thread = ManagedThread(task, name=f"tokenmill-{name}", on_error=self.fail)
        self._threads.append(thread)
        thread.start()

    def beat(self, interval: float, make_heartbeat: Callable[[], Heartbeat]) -> None:
        """Send a heartbeat every `interval` seconds, in the background."""
        pause = threading.Event()

        def beat() -> None:
            while True:
                self.send(make_heartbeat())
                pause.wait(interval)

        self.run_in_background(beat, "statistics")

    def fail(self, error: Exception) -> None:
        """End the process at once: something that it depends on is broken. The proxy starts another."""
        self._end(_EXIT_FAILED)

    def _send_all(self) -> None:
        while (message := self._outgoing.get()) is not None:
            self._send_queue.put(message, timeout=None)
        self._send_queue.socket.linger = 500
        self._send_queue.close()

    @staticmethod
    def _end(exit_code: int) -> None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)  # quick, and other threads may be anywhere


class _Reporter(logging.Handler):
    """Sends warnings and errors to the caller's process, where its user has configured logging."""

    def __init__(self, child: Child) -> None:
        super().__init__(logging.WARNING)
        self._child = child

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{self._child.name}: {self.format(record)}"
        try:
            self._child._outgoing.put_nowait(LogRecord(record.levelno, record.name, text))
        except queue.Full:  # it is in the process's own log
            return


def _leave_signals_to_parent() -> None:
    """Ctrl-C and service managers signal all processes at once; the parent drains and ends its children."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _show_stacks_on_request() -> None:
    """Stacks go to stderr, which is the process's log: on a crash, and on SIGUSR1 even if Python code does not run."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def _die_with_parent(parent_pid: int) -> None:
    """End when the parent does, however it ends: the parent holds the other end of stdin and never writes to it.

    On Linux the kernel does it as well, even to a process that is stopped or stuck.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(_EXIT_FAILED)

    def wait_for_end() -> None:
        while os.read(0, 1):
            pass
        os._exit(_EXIT_FAILED)

    threading.Thread(target=wait_for_end, name="tokenmill-parent", daemon=True).start()
