"""Progress bars on the terminal (stderr) for whatever takes over a second. Nothing is shown elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tokenmill.outputs import RequestOutput

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

QUIET_SECONDS = 1.0
"""Work shorter than this shows no bar."""


@contextmanager
def loading_progress(model_name: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """A callback (what, done, in all) that draws a bar once loading takes over a second. Done are bytes, values
    of weights, or kernels (`what` is `kernels`)."""
    if not sys.stderr.isatty():
        yield None
        return
    started = time.monotonic()
    bar: Progress | None = None

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            if time.monotonic() - started < QUIET_SECONDS:
                return
            bar = _percentage_bar()
            bar.add_task("", total=total)
            bar.start()
        step = ": compiling kernels, once on this machine" if what == "kernels" else ""
        bar.update(bar.task_ids[0], description=f"Loading {model_name}{step}", completed=done, total=total)

    try:
        yield on_progress
    finally:
        if bar is not None:
            bar.stop()


@contextmanager
def generation_progress(count: int, show: bool) -> Iterator[Callable[[RequestOutput], None]]:
    """A callback for each finished request that draws a bar with the output speed."""
    if not show or not sys.stderr.isatty():
        yield lambda output: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[speed]}"), console=_stderr(), transient=True) as bar:
        task = bar.add_task("", total=count, speed="")
        started = time.monotonic()
        num_tokens = 0

        def on_output(output: RequestOutput) -> None:
            nonlocal num_tokens
            num_tokens += sum(one.length for one in output.outputs)
            speed = num_tokens / max(time.monotonic() - started, 1e-9)
            bar.update(task, advance=1, speed=f"{speed:,.0f} tokens/s")

        yield on_output


def _percentage_bar() -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    return Progress(*columns, console=_stderr(), transient=True)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)
