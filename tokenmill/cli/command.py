"""How a function becomes a command: option groups are expanded, and errors end in one line and an exit code.

Exit codes: 0 success, 1 failure of the engine or the machine, 2 the user can mend it, 130 Ctrl-C, 141 closed pipe;
129 and 143 for a closed terminal and SIGTERM, where a command has something to clean up.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from tokenmill.cli.console import print_error
from tokenmill.errors import TokenmillError, UserError

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
SIGNAL_EXITS = tuple(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))
"""Exit codes of commands that a signal ended."""

_DEBUG_OPTION = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


def command(app: typer.Typer, name: str, *, epilog: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as command `name` of `app`.

    A parameter whose type is a dataclass is a group of options: each of its fields (annotated with `typer.Option`)
    becomes an option of the command, and the function gets the dataclass. `--debug` is added to every command.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        app.command(name, epilog=epilog, help=_unwrapped(inspect.getdoc(function) or ""))(
            _with_error_boundary(_expand_option_groups(function))
        )
        return function

    return register


def _unwrapped(text: str) -> str:
    """Each paragraph on one line, for the terminal to wrap."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def examples(*pairs: tuple[str, str]) -> str:
    """An epilog out of (what it does, command line) pairs."""
    blocks = []
    for purpose, line in pairs:
        heading = purpose if purpose.endswith("?") else f"{purpose}:"
        blocks.append(f"[dim]{escape(heading)}[/dim]\n  {escape(line)}")
    return "\n\n".join(["[bold]Examples[/bold]", *blocks])


def _expand_option_groups(function: Callable[..., None]) -> Callable[..., None]:
    hints = get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint) and isinstance(hint, type)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in groups:
            parameters.extend(_group_parameters(groups[parameter.name]))
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]))

    @functools.wraps(function)
    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        function(**values)

    return _with_parameters(expanded, parameters)


def _group_parameters(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default if field.default_factory is dataclasses.MISSING else field.default_factory(),
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]


def _with_parameters(function: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """Give `function` the signature that typer reads its options from."""
    function.__dict__.pop("__wrapped__", None)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function


def _with_error_boundary(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def guarded(*, debug: bool = False, **values: Any) -> None:
        run_guarded(lambda: function(**values), debug=debug)

    parameters = list(inspect.signature(function).parameters.values())
    parameters.append(
        inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_DEBUG_OPTION)
    )
    return _with_parameters(guarded, parameters)


class _Ended(BaseException):
    """A signal asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While the block runs, SIGTERM and a closed terminal end it as Ctrl-C does: what it had begun is cleaned up.

    Signals that somebody ignores (`nohup`) or handles are left alone.

    Raises:
        typer.Exit: with the exit code that shells give to processes ended by the signal.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise _Ended(number)

    numbers = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only that one can handle signals
    try:
        for number in numbers:
            signal.signal(number, end)
        yield
    except _Ended as ended:
        raise typer.Exit(ended.exit_code) from None
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def run_guarded(function: Callable[[], None], *, debug: bool = False) -> None:
    """Run a command's body; every error becomes one line on stderr and an exit code.

    Raises:
        typer.Exit: with the exit code; with `debug`, the error itself.
    """
    try:
        function()
    except TokenmillError as error:
        if debug:
            raise
        print_error(error)
        raise typer.Exit(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of stdout left. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_BROKEN_PIPE) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:  # the process boundary: a bug still ends in one line
        if debug or not _is_unexpected(error):
            raise
        print_error(f"unexpected {type(error).__name__}: {error} (--debug shows where)")
        raise typer.Exit(EXIT_FAILURE) from None


def _is_unexpected(error: Exception) -> bool:
    """Whether it is a bug of ours, and not a usage error that typer itself prints."""
    return not hasattr(error, "format_message")
