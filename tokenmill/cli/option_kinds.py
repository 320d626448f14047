"""Kinds of options, so that a command's options read as a list: what each is for, and what holds without it.

Used as `Annotated[int | None, number("Tokens of a prompt.", panel="Workload")] = None`.
"""

from __future__ import annotations

from typing import Any

import typer


def number(text: str, *, panel: str | None = None, default: str | bool = True, at_least: int | None = 1) -> Any:
    """A whole number.

    Args:
        text: what it is.
        panel: the heading in the help under which it stands.
        default: what the help shows as its default; True: the value in the signature.
        at_least: the least number that is taken; None: any.
    """
    return typer.Option(metavar="N", min=at_least, help=text, show_default=default, rich_help_panel=panel)


def word(metavar: str, text: str, *, panel: str | None = None, default: str | bool = True) -> Any:
    """A value of any other kind; `metavar` stands for it in the help. The rest is as in `number`."""
    return typer.Option(metavar=metavar, help=text, show_default=default, rich_help_panel=panel)


def switch(name: str, text: str, *, panel: str | None = None) -> Any:
    """Something that is off without it; `name` is `--name`."""
    return typer.Option(name, help=text, rich_help_panel=panel)
