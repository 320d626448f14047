"""`ManagedThread`: a thread whose exceptions are never lost. Executors and workers run all their tasks on these.

A plain thread that raises prints a traceback and is gone, and whoever waits for its work waits for ever. Here the
exception reaches the owner, who ends or restarts what depends on the thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from tokenmill.executor.waiting import join

logger = logging.getLogger(__name__)


class ManagedThread:
    """Runs `task` once on a thread of its own.

    Args:
        task: what to do; it ends when its owner tells it to.
        name: of the thread, for stack dumps.
        on_error: called on the thread with the exception that ended `task`. It must not raise.
    """

    def __init__(self, task: Callable[[], None], *, name: str, on_error: Callable[[Exception], None]) -> None:
        self._task: Callable[[], None] | None = task
        self._on_error = on_error
        self._error: Exception | None = None
        # A daemon: an executor that nobody shut down must not keep the interpreter from ending.
        self._thread = _Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def error(self) -> Exception | None:
        """What ended the task, if it did not end by itself."""
        return self._error

    @property
    def is_alive(self) -> bool:
        """Whether the task is under way."""
        return self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on this thread."""
        return threading.current_thread() is self._thread

    def is_told_to_end(self) -> None:
        """Note that the task was told to end by somebody who does not wait for it; `join_ending` does."""
        self._thread.is_ending = True

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end; False if it has not come in `timeout` seconds. On the thread itself: returns at once."""
        if not self.is_current and self._thread.ident is not None:
            join(self._thread, timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        assert self._task is not None
        try:
            self._task()
        except BaseException as cause:  # the thread's boundary: the owner decides, about a library's panic or exit, too
            error = cause if isinstance(cause, Exception) else _as_exception(cause)
            self._error = error
            logger.exception("The thread %s ended with an error.", self._thread.name)
            try:
                self._on_error(error)
            except Exception:
                logger.critical("The error of thread %s could not be handled.", self._thread.name, exc_info=True)
        finally:
            self._task = None  # with all that it owns, an engine for one, whoever keeps this object


class _Thread(threading.Thread):
    """One that says whether it is about to end; the interpreter lists all threads."""

    is_ending = False


def join_ending(timeout: float) -> None:
    """Wait for all managed threads of this process that are about to end, `timeout` seconds at the most."""
    deadline = time.monotonic() + timeout
    for thread in threading.enumerate():
        if isinstance(thread, _Thread) and thread.is_ending and thread is not threading.current_thread():
            join(thread, max(0.0, deadline - time.monotonic()))


def _as_exception(cause: BaseException) -> Exception:
    """Something that its receivers' `except Exception` takes. Panics of Rust libraries are no `Exception`, for one."""
    error = RuntimeError(f"{type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
