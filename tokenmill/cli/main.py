"""The `tokenmill` program: puts the commands together. Nothing here may import torch: `--help` must be instant."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from tokenmill.cli import bench, build, chat, inspect, refit, run, serve
from tokenmill.cli.command import EXIT_INTERRUPTED, SIGNAL_EXITS, examples
from tokenmill.version import __version__

_EPILOG = examples(
    ("Ask the demo model (fetched on first use)", 'tokenmill run "Why is the sky blue?"'),
    ("Talk with a model of your own", "tokenmill chat path/to/model.gguf"),
    ("Serve it to OpenAI clients", "tokenmill serve Qwen/Qwen3-0.6B --port 8000"),
    ("Compile it to an engine that starts in a second", "tokenmill build smollm2:135m -o engine"),
    ("Know what a model needs before you load it", "tokenmill inspect Qwen/Qwen3-0.6B"),
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"tokenmill {__version__}")
        raise typer.Exit


_HELP = (
    "Compile and serve large language models.\n\n"
    "A MODEL is a directory in Hugging Face format, a .gguf file, an engine that tokenmill build wrote, a hub id such "
    "as Qwen/Qwen3-0.6B, or an alias: smollm2:135m (the demo model, used when none is named) or gemma3:270m."
)


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What comes before a command."""


def build_app() -> typer.Typer:
    """The application with all its commands."""
    app = typer.Typer(
        name="tokenmill",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=_HELP, epilog=_EPILOG)(_root)
    for module in (run, chat, serve, build, refit, bench, inspect):
        module.register(app)
    return app


def main() -> None:
    """Run the program with the arguments of the process."""
    try:
        build_app()()
    except KeyboardInterrupt:
        _end_at_once()
    except SystemExit as ending:
        if isinstance(ending.code, int) and ending.code in SIGNAL_EXITS:
            _end_at_once(ending.code)
        raise


def _end_at_once(code: int = EXIT_INTERRUPTED) -> NoReturn:
    """End the process after Ctrl-C or another signal. What there was to close is closed; other threads may still be
    loading or compiling, and the interpreter's own end, which takes most of a second, could find them in code that
    cannot be ended."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
