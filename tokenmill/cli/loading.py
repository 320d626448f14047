"""Loading a model for a command: imports late, shows progress, shuts down at the end whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tokenmill.cli.console import progress

if TYPE_CHECKING:
    from tokenmill.llm import LLM


@contextmanager
def loaded_llm(arguments: dict[str, Any]) -> Iterator[LLM]:
    """An `LLM` made of `arguments`, for the time of the block.

    Raises:
        UserError: the model or an argument cannot be used.
        OutOfMemoryError: the model does not fit.
    """
    with progress("Starting"):
        from tokenmill.llm import LLM  # imports torch, which takes a second or more: after the arguments were checked

    with LLM(**arguments) as llm:  # shows its own progress
        yield llm
