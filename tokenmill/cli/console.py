"""Where the command line writes: answers to stdout, everything else (notes, progress, errors) to stderr.

Every command prints through these functions, so that `tokenmill run ... | other-program` carries the answer alone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from tokenmill.errors import TokenmillError

PROGRESS_DELAY = 1.0
"""Seconds that a piece of work may take before a spinner says what it is."""

_KEPT_CONTROLS = frozenset("\n\t")


def stdout_console() -> Console:
    """A console on today's `sys.stdout` (tables of `bench` and `inspect`)."""
    return Console(file=sys.stdout, highlight=False)


def stderr_console() -> Console:
    """A console on today's `sys.stderr`."""
    return Console(file=sys.stderr, highlight=False)


def print_note(text: str) -> None:
    """A dim line on stderr, for people; written whether or not stderr is a terminal."""
    stderr_console().print(Text(text, style="dim"), soft_wrap=True)


def print_warning(text: str) -> None:
    """A yellow line on stderr."""
    stderr_console().print(Text(text, style="yellow"), soft_wrap=True)


def print_error(error: TokenmillError | str) -> None:
    """One red line on stderr: what went wrong, and what to do about it."""
    text = Text.assemble(("error: ", "bold red"), (" ".join(str(error).split()), "red"))
    stderr_console().print(text, soft_wrap=True)


def readable_size(num_bytes: int) -> str:
    """Bytes in the unit that reads best."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.2f} {unit}"
    return f"{num_bytes} B"


def safe_for_terminal(text: str) -> str:
    """`text` without control characters, so that a model's answer cannot drive the reader's terminal."""
    if text.isprintable():
        return text
    return "".join(
        character
        for character in text
        if character in _KEPT_CONTROLS or not (ord(character) < 32 or 127 <= ord(character) < 160)
    )


def write_answer(text: str) -> None:
    """A piece of an answer to stdout, at once; control characters are left out on a terminal."""
    if text:
        sys.stdout.write(safe_for_terminal(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


@contextmanager
def progress(description: str) -> Iterator[None]:
    """A spinner on stderr while the block runs, from the second second on; nothing when stderr is no terminal."""
    console = stderr_console()
    if not console.is_terminal:
        yield
        return
    done = threading.Event()

    def spin() -> None:
        if done.wait(PROGRESS_DELAY):
            return
        with console.status(Text(description, style="dim")):
            done.wait()

    thread = threading.Thread(target=spin, name="tokenmill-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
