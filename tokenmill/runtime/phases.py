"""`phase`: names what the runner does, for a profiler. Costs a microsecond when none listens."""

from __future__ import annotations

from torch.profiler import record_function

PREFIX = "tokenmill: "
"""In front of the names, so that they can be told from the operations inside."""


def phase(name: str) -> record_function:
    """A context manager; what runs in it is `name` on the profiler's timeline."""
    return record_function(PREFIX + name)
