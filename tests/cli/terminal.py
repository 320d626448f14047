"""A program on a pseudo-terminal: type to it, wait for what it shows."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

_PROGRESS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|[⠀-⣿] *|Starting|Loading [^\r]*|\s")
DEADLINE = 60.0


class Terminal:
    """Runs `python -m tokenmill` with a terminal of its own.

    Args:
        arguments: of tokenmill.
        environment: of the program.
    """

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        self.shown = ""
        self._seen = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tokenmill", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
            close_fds=True,
        )
        os.close(slave)

    def type(self, text: str) -> None:
        """As if typed."""
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Type Ctrl-C, a moment after what was last shown: Python can miss one while it sets up line editing."""
        time.sleep(0.3)
        self.type("\x03")

    def wait_for(self, text: str) -> str:
        """Wait until `text` is shown, after what was waited for before; what was shown up to its end."""
        deadline = time.monotonic() + DEADLINE
        while (found := self.shown.find(text, self._seen)) < 0:
            remaining = deadline - time.monotonic()
            assert remaining > 0, f"{text!r} did not appear; the terminal shows {self.shown[-2000:]!r}"
            self._read(remaining)
        shown = self.shown[self._seen : found + len(text)]
        self._seen = found + len(text)
        return shown

    def wait_for_answer(self, num_characters: int) -> None:
        """Wait until that many further characters are shown, progress left out."""
        deadline = time.monotonic() + DEADLINE
        while len(_PROGRESS.sub("", self.shown[self._seen :])) < num_characters:
            remaining = deadline - time.monotonic()
            assert remaining > 0, f"no more came; the terminal shows {self.shown[-2000:]!r}"
            self._read(remaining)
        self._seen = len(self.shown)

    def exit_code(self) -> int:
        """Wait for the end of the program."""
        deadline = time.monotonic() + DEADLINE
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read(0.05)
        return self.process.wait(timeout=1)

    def _read(self, timeout: float) -> None:
        if not select.select([self._master], [], [], timeout)[0]:
            return
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the program closed the terminal
            time.sleep(0.01)
            return
        self.shown += data.decode(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


def _take_terminal() -> None:
    """Make standard input the controlling terminal, so that a typed Ctrl-C becomes a signal, which is not ignored."""
    import fcntl
    import signal
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs, and so some CI runners, start with it ignored

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
