"""`KernelChoices`: which variant of a kernel an engine uses on this machine, by the times that builds measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tokenmill.errors import EngineFileError
from tokenmill.ops.cpu.linear_int8 import LinearVariant, LinearWeight, linear_variants
from tokenmill.ops.cpu.machine import machine_key
from tokenmill.program.package import TIMING_CACHE_NAME, EnginePackage
from tokenmill.program.timing_cache import TimingCache, common_timing_cache, linear_key

logger = logging.getLogger(__name__)

MARGIN: Final = 1.02
"""What the usual variant may be slower by before another takes its place: measurements are not exact."""


class KernelChoices:
    """The fastest variants that are known; the usual ones where nothing was measured on this machine.

    Args:
        cache: measured times.
        machine: key of this machine.
        profiles: the numbers of tokens that were measured.
    """

    def __init__(self, cache: TimingCache | None = None, machine: str = "", profiles: Sequence[int] = ()) -> None:
        self._cache = cache or TimingCache()
        self._machine = machine
        self._profiles = profiles

    @staticmethod
    def of(package: EnginePackage, num_threads: int) -> KernelChoices:
        """What was measured on this machine: by the build of an engine, or else by builds of others here.

        Raises:
            EngineFileError: the engine's timing cache is damaged.
        """
        content = package.files.get(TIMING_CACHE_NAME)
        cache, machine = TimingCache(), machine_key(num_threads)
        if content is not None:
            text = content.read_bytes() if isinstance(content, Path) else content
            cache = TimingCache.decode(text, TIMING_CACHE_NAME)
        profiles = package.config.build_config.get("profiles", ())
        if machine in cache.times:
            return KernelChoices(cache, machine, profiles)
        common = _common_cache()
        if machine not in common.times and cache.times:
            logger.info(
                "The engine's kernels were measured on '%s', not on '%s': the usual ones are used. "
                "`tokenmill build` measures them here.",
                next(iter(cache.times)),
                machine,
            )
        return KernelChoices(common, machine, profiles)

    def linear(self, weight: LinearWeight, *, one_token: bool) -> LinearVariant | None:
        """The variant for products of one token with `weight`, or the best over all larger numbers that were measured;
        None if nothing was."""
        found = [
            self._cache.known(
                self._machine, linear_key(weight.format, weight.num_rows, weight.num_columns, weight.gated, num_tokens)
            )
            for num_tokens in self._profiles
            if (num_tokens == 1) == one_token
        ]
        rows = [times for times in found if times]
        variants = {variant.name: variant for variant in linear_variants(one_token=one_token)}
        names = [name for name in variants if rows and all(name in times for times in rows)]
        if not names:
            return None
        # Relative to the fastest, so that every number of tokens counts the same.
        scores = {name: sum(times[name] / min(times.values()) for times in rows) for name in names}
        usual, best = names[0], min(names, key=lambda name: scores[name])
        return variants[usual if scores[usual] <= MARGIN * scores[best] else best]


def _common_cache() -> TimingCache:
    """What all builds of this user measured; nothing if that cannot be read."""
    try:
        return TimingCache.load(common_timing_cache())
    except EngineFileError as error:
        logger.warning("%s", error)
        return TimingCache()
