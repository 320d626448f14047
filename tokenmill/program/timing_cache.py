"""`TimingCache`: how long each variant of a kernel took, by machine and shape; the fastest one is what engines use.

A build measures what the cache lacks, and keeps it in a file that all builds share and in `timing.cache` of the engine,
where executors look their variants up. An entry that was measured on another processor, with other kernels or another
number of threads is never used: those are in the machine's key (`ops/cpu/machine.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from filelock import FileLock

from tokenmill.env import read_environment
from tokenmill.errors import EngineFileError

_FORMAT: Final = "tokenmill-timing-cache"
_VERSION: Final = 1
_REMEDY: Final = "Remove the file: the next build measures again."


@dataclass(slots=True)
class TimingCache:
    """Measured times.

    Args:
        times: microseconds by machine, by what was measured, by variant.
    """

    times: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def add(self, machine: str, key: str, microseconds: Mapping[str, float]) -> None:
        """Keep the times of all variants of one kernel for one shape."""
        self.times.setdefault(machine, {})[key] = dict(microseconds)

    def known(self, machine: str, key: str) -> Mapping[str, float] | None:
        """The times by variant; None if it was not measured on this machine."""
        return self.times.get(machine, {}).get(key)

    def fastest(self, machine: str, key: str) -> str | None:
        """The fastest variant; None if it was not measured on this machine."""
        found = self.known(machine, key)
        return min(found, key=lambda variant: found[variant]) if found else None

    def merge(self, other: TimingCache) -> None:
        """Take in the entries of another cache; its times win."""
        for machine, keys in other.times.items():
            self.times.setdefault(machine, {}).update({key: dict(times) for key, times in keys.items()})

    # ---- text and files --------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """JSON text, sorted."""
        plain = {"format": _FORMAT, "version": _VERSION, "times": self.times}
        return (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def decode(text: bytes, source: str) -> TimingCache:
        """The cache that `encode` wrote.

        Raises:
            EngineFileError: it is no timing cache, or of another version.
        """
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise EngineFileError(f"{source} is not JSON: {error}.", field="timing_cache", remedy=_REMEDY) from None
        if not isinstance(plain, dict) or plain.get("format") != _FORMAT or plain.get("version") != _VERSION:
            raise EngineFileError(
                f"{source} is not a timing cache of version {_VERSION}.", field="timing_cache", remedy=_REMEDY
            )
        cache = TimingCache()
        for machine, key, times in _entries(plain.get("times")):
            if not times or not all(_is_time(value) for value in times.values()):
                raise EngineFileError(
                    f"{source}: the times of '{key}' are not numbers.", field="timing_cache", remedy=_REMEDY
                )
            cache.add(machine, key, times)
        return cache

    @staticmethod
    def load(path: Path) -> TimingCache:
        """The cache in a file; empty if there is none.

        Raises:
            EngineFileError: the file is no timing cache, or cannot be read.
        """
        try:
            return TimingCache.decode(path.read_bytes(), str(path))
        except FileNotFoundError:
            return TimingCache()
        except OSError as error:
            raise EngineFileError(
                f"{path} cannot be read: {error.strerror or error}.",
                field="timing_cache",
                remedy="Name another file in timing_cache.",
            ) from error

    def save_into(self, path: Path) -> None:
        """Add the entries to the file's; builds that run at the same time lose nothing.

        Raises:
            EngineFileError: the file is no timing cache, or cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{path.name}.lock")):
                together = TimingCache.load(path)
                together.merge(self)
                partial = path.with_name(f".{path.name}.partial")
                try:
                    partial.write_bytes(together.encode())
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise EngineFileError(
                f"{path} cannot be written: {error.strerror or error}.",
                field="timing_cache",
                remedy="Name another file in timing_cache.",
            ) from error


def _entries(times: Any) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(machine, key, times by variant); what has another shape comes with no times."""
    for machine, keys in times.items() if isinstance(times, dict) else (("", {"times": None}),):
        for key, variants in keys.items() if isinstance(keys, dict) else ((machine, None),):
            yield machine, key, variants if isinstance(variants, dict) else {}


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def common_timing_cache() -> Path:
    """The file that builds share unless `BuildConfig.timing_cache` names another one; executors look there, too."""
    return read_environment().cache_dir / "timing.cache"


def linear_key(weight_format: str, num_rows: int, num_columns: int, gated: bool, num_tokens: int) -> str:
    """What a product's times are kept under.

    Args:
        weight_format: of the weight.
        num_rows, num_columns: of the weight; gate and up rows together if gated.
        gated: whether its first half is the gate of the second.
        num_tokens: computed at once.
    """
    kind = "gated linear" if gated else "linear"
    return f"{kind} {weight_format} {num_rows}x{num_columns}, {num_tokens} tokens"
