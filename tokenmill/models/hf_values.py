"""`Values`: typed, checked access to the entries of a Hugging Face configuration, with errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tokenmill.errors import CheckpointError


class Values:
    """Entries of one configuration. An entry that is missing or null takes its default; without one it is an error.

    Args:
        entries: what the file says.
        defaults: what holds for entries that the file leaves out (but not for those it sets to null).
        path: where the entries lie, for error messages.
    """

    def __init__(self, entries: Mapping[str, Any], defaults: Mapping[str, Any], path: str = "") -> None:
        self._entries = entries
        self._defaults = defaults
        self._path = path

    def get(self, key: str) -> Any:
        """The entry, the default if it is left out, or None."""
        return self._entries[key] if key in self._entries else self._defaults.get(key)

    def is_set(self, key: str) -> bool:
        """Whether the file itself has the entry, and not null."""
        return self._entries.get(key) is not None

    def invalid(self, key: str, expected: str) -> CheckpointError:
        """The error for an entry that is not what it must be."""
        value = self.get(key)
        what = "is missing from" if value is None else f"is {_short(value)} in"
        return CheckpointError(
            f"'{self._path}{key}' {what} the model's configuration; it must be {expected}.",
            field="model",
            remedy="The configuration is damaged or belongs to another kind of model; fetch the model again.",
        )

    def integer(self, key: str, *, default: int | None = None, minimum: int = 1) -> int:
        """An integer of at least `minimum`."""
        value = self.get(key)
        if value is None:
            value = self._defaults.get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.invalid(key, f"an integer of at least {minimum}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """A positive integer, or None if it is null or left out without a default."""
        return None if self.get(key) is None else self.integer(key)

    def number(self, key: str, *, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self.get(key)
        if value is None:
            value = self._defaults.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.invalid(key, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A positive, finite number, or None if it is null or left out without a default."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            value = self._defaults.get(key, default)
        if not isinstance(value, bool):
            raise self.invalid(key, "true or false")
        return value

    def text(self, key: str) -> str:
        """A string."""
        value = self.get(key)
        if value is None:
            value = self._defaults.get(key)
        if not isinstance(value, str):
            raise self.invalid(key, "a string")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; none if it is null or left out."""
        value = self.get(key)
        ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise self.invalid(key, "a token id or a list of them")
        return ids

    def nested(self, key: str) -> Values | None:
        """The entries under `key`, without defaults; None if it is null or left out."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.invalid(key, "an object")
        return Values(value, {}, f"{self._path}{key}.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
