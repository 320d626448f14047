"""`Interruption`: a word in memory that tells a runner that somebody waits for the engine."""

from __future__ import annotations

import ctypes


class Interruption:
    """Set by those who put something into the engine's inbox, cleared by the engine's thread before it looks there.

    Any thread may set and read it; native code reads it at `address` between two steps.

    Attributes:
        address: of the int64, which is not 0 while it is set.
    """

    def __init__(self) -> None:
        self._word = ctypes.c_int64(0)
        self.address = ctypes.addressof(self._word)

    def set(self) -> None:
        """Somebody waits."""
        self._word.value = 1

    def clear(self) -> None:
        """Those who waited are heard."""
        self._word.value = 0

    @property
    def is_set(self) -> bool:
        """Whether somebody waits."""
        return self._word.value != 0
