"""`tokenmill build`: a model compiled to an engine directory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tokenmill.cli.build_options import BuildOptions
from tokenmill.cli.build_summary import print_summary
from tokenmill.cli.command import command, ended_by_signals, examples
from tokenmill.cli.console import print_note, print_warning, progress, stderr_console, stdout_console
from tokenmill.errors import InvalidParameterError, UserError

if TYPE_CHECKING:
    from tokenmill.builder.build import ProgressCallback
    from tokenmill.builder.passes import PassReport

_EPILOG = examples(
    ("The demo model, in its own format", "tokenmill build smollm2:135m -o engines/smollm2"),
    ("Run what was built", 'tokenmill run engines/smollm2 "Why is the sky blue?"'),
    ("A model in 8 bits, for long prompts", "tokenmill build Qwen/Qwen3-0.6B -o qwen3 --quantization int8"),
    ("See what the passes do", "tokenmill build smollm2:135m -o engine --dump-passes passes"),
)

_PHASES = {
    "resolve": "Opening the model",
    "capture": "Capturing the graph",
    "passes": "Running passes",
    "lower": "Planning memory",
    "tune": "Measuring kernels",
    "pack": "Packing weights",
    "save": "Writing the engine",
}


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "build", epilog=_EPILOG)(build)


def build(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The model to compile.", show_default=False)
    ] = None,
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Where the engine goes; one that is there is replaced."),
    ] = None,
    list_passes: Annotated[bool, typer.Option("--list-passes", help="Print the passes and exit.")] = False,
    dump_passes: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the captured graph and each pass's changes to files of this folder."),
    ] = None,
    options: BuildOptions,
) -> None:
    """Compile a model to an engine: a directory that runs without the model's code, and starts in a second.

    The engine holds everything that running needs. Give it wherever a model is asked for, such as tokenmill run, chat
    and serve.
    """
    if list_passes:
        _print_passes()
        return
    if model is None:
        raise UserError("The model is missing.", remedy="Try: tokenmill build smollm2:135m -o engine")
    if output is None:
        raise InvalidParameterError("Say where the engine goes.", field="output", remedy="Add -o DIRECTORY.")
    from tokenmill.program.engine_writing import check_output  # imports numpy, which --help need not wait for

    check_output(output)
    with progress("Starting"):
        from tokenmill.builder.build import build as build_engine  # imports torch: after the arguments were checked
        from tokenmill.config import BuildConfig
    config = BuildConfig(**options.build_arguments())
    with ended_by_signals(), _progress_bar() as on_progress:
        engine = build_engine(
            model,
            config,
            on_progress=on_progress,
            on_passes=None if dump_passes is None else lambda reports: _dump(dump_passes, reports),
        )
        on_progress("save", 0, 1)
        folder = engine.save(output)
    for notice in engine.config.report.get("notices", ()):
        print_warning(f"Note: {notice}.")
    print_summary(engine, folder)
    if dump_passes is not None:
        print_note(f"The passes' changes are in {dump_passes}.")


def _print_passes() -> None:
    with progress("Starting"):
        from tokenmill.builder.passes import PASSES
    table = Table(title="Passes, in order", title_justify="left", title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in PASSES:
        table.add_row(one.name, one.description)
    stdout_console().print(table)


def _dump(folder: Path, reports: list[PassReport]) -> None:
    """The graph before the passes, what each of them changed, and the graph after them."""
    if not reports:
        raise InvalidParameterError("No pass runs.", field="dump_passes", remedy="Raise --opt-level.")
    files = {"00-captured.txt": reports[0].before.text()}
    for index, report in enumerate(reports, start=1):
        lines = [f"# {report.name}: {len(report.changes)} changes", *(f"# {line}" for line in report.changes)]
        files[f"{index:02d}-{report.name}.diff"] = "\n".join([*lines, report.diff()])
    files[f"{len(reports) + 1:02d}-final.txt"] = reports[-1].after.text()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidParameterError(
            f"{folder} cannot be written: {error.strerror or error}.", field="dump_passes"
        ) from None


@contextmanager
def _progress_bar() -> Iterator[ProgressCallback]:
    """A callback that draws the phases as a bar on stderr; nothing when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda phase, done, total: None
        return
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (TextColumn("{task.description:<22}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr_console(), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def on_progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                for task in tasks.values():
                    bar.update(task, completed=bar.tasks[task].total)
                    bar.stop_task(task)
                tasks[phase] = bar.add_task(_PHASES.get(phase, phase), total=total)
            bar.update(tasks[phase], completed=done, total=total)

        yield on_progress
