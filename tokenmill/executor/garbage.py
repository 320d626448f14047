"""`rare_collections`: how often Python looks for garbage while an engine steps. Entered by `BaseWorker.run`.

A step of 2,048 rows makes thousands of short-lived objects. By default that starts a collection of the youngest objects
several times a step, and of all objects, torch's and the libraries' among them, every ten steps: 150 ms each, in which
the device has nothing to do (docs/log.md). Steps leave no cycles behind, so collections may be rare.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

NUM_NEW_OBJECTS: Final = 50_000
"""Objects made, less those gone again, that start a collection; Python's own number is 700 to 2,000."""


@contextmanager
def rare_collections() -> Iterator[None]:
    """Collect only when `NUM_NEW_OBJECTS` are new; a caller who collects less often, or never, is left alone."""
    before = gc.get_threshold()
    if 0 < before[0] < NUM_NEW_OBJECTS:
        gc.set_threshold(NUM_NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
