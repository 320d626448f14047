"""Reads what a person types: line editing and history on a terminal, plain lines from a pipe.

A line that ends with a backslash goes on in the next one.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType

_PROMPT = "\001\033[1m\002> \001\033[0m\002"
_CONTINUATION_PROMPT = ". "
_HISTORY_LENGTH = 1000


class LineReader:
    """Reads entries of one or more lines.

    Args:
        history_file: where lines typed on a terminal are kept for the next time; None: nowhere.
    """

    def __init__(self, history_file: Path | None = None) -> None:
        self.interactive = sys.stdin.isatty()
        self._history_file = history_file
        self._readline = _readline() if self.interactive else None
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # a wrong byte is no reason to stop
        if self._readline is not None and history_file is not None and history_file.exists():
            try:
                self._readline.read_history_file(history_file)
            except OSError:
                self._history_file = None  # unreadable: leave it as it is

    def read(self) -> str | None:
        """The next entry; None at the end of the input, or for Ctrl-C on an empty line of a terminal."""
        lines: list[str] = []
        while True:
            try:
                line = self._read_line(_CONTINUATION_PROMPT if lines else _PROMPT)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                print(file=sys.stderr)
                if lines or self._typed():
                    lines = []  # Ctrl-C throws the entry away
                    continue
                return None
            if line is None:
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def save_history(self) -> None:
        """Keep the typed lines for the next time; a history that cannot be written is no error."""
        if self._readline is None or self._history_file is None:
            return
        self._readline.set_history_length(_HISTORY_LENGTH)
        try:
            self._history_file.parent.mkdir(parents=True, exist_ok=True)
            self._history_file.touch(mode=0o600)
            self._readline.write_history_file(self._history_file)
        except OSError:
            return

    def _read_line(self, prompt: str) -> str | None:
        if self.interactive:
            try:
                return input(prompt if self._readline is not None else "> ")
            except EOFError:
                print(file=sys.stderr)
                return None
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    def _typed(self) -> str:
        """What stands on the line that Ctrl-C ended."""
        return "" if self._readline is None else str(self._readline.get_line_buffer())


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # not on every platform
        return None
    return readline
