"""`tune`: measures the variants of kernels, where they were not measured before.

What can be tuned is a `Tunable`: a key, the names of the variants, and a way to run one. This module knows
nothing about kernels; `linear_tuning.py` lists those of a program.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tokenmill.program.timing_cache import TimingCache

ROUNDS: Final = 5
"""Turns that every variant gets, one after the other, so that a slow moment of the machine hits all of them."""

ROUND_SECONDS: Final = 0.002
"""A turn runs a variant as often as fits in this time, at least once; the best turn counts."""


HOPELESS: Final = 3.0
"""Times slower than the fastest, from which on a variant is given up."""


@dataclass(frozen=True, slots=True)
class Tunable:
    """One kernel for one shape.

    Args:
        key: the kernel and everything that its time depends on, as text: what its times are kept under.
        variants: names; the first is the one to use if nothing is known.
        prepare: makes a variant ready; what it returns runs it once.
    """

    key: str
    variants: tuple[str, ...]
    prepare: Callable[[str], Callable[[], None]]


@dataclass(frozen=True, slots=True)
class TuningReport:
    """What a tuning did.

    Args:
        cache: the times of exactly these tunables on this machine.
        num_measured, num_reused: tunables.
    """

    cache: TimingCache
    num_measured: int
    num_reused: int


def tune(
    tunables: Sequence[Tunable],
    known: TimingCache,
    machine: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> TuningReport:
    """Times of all variants of all tunables.

    Args:
        tunables: what to measure; those with one variant are left out.
        known: times from before.
        machine: key of this machine.
        on_progress: told how many are done, and how many there are.
    """
    found = TimingCache()
    num_measured = num_reused = 0
    chosen = [one for one in tunables if len(one.variants) > 1]
    for index, tunable in enumerate(chosen):
        if on_progress is not None:
            on_progress(index, len(chosen))
        times = known.known(machine, tunable.key)
        if times is not None and times.keys() == set(tunable.variants):
            num_reused += 1
        else:
            times = measure(tunable)
            num_measured += 1
        found.add(machine, tunable.key, times)
    return TuningReport(found, num_measured, num_reused)


def measure(tunable: Tunable, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Microseconds of one run of each variant: the best of several turns. Variants that are much slower than another in
    their first run get no more turns."""
    runs = {variant: tunable.prepare(variant) for variant in tunable.variants}
    for run in runs.values():
        run()  # compiles and warms up
    best = {variant: min(_seconds(run, 1, clock) for _ in range(3)) for variant, run in runs.items()}
    limit = HOPELESS * min(best.values())
    counts = {
        variant: max(1, min(1000, int(ROUND_SECONDS / max(seconds, 1e-9))))
        for variant, seconds in best.items()
        if seconds <= limit
    }
    for _ in range(ROUNDS):
        for variant, count in counts.items():
            best[variant] = min(best[variant], _seconds(runs[variant], count, clock))
    return {variant: round(1e6 * seconds, 3) for variant, seconds in best.items()}


def _seconds(run: Callable[[], None], count: int, clock: Callable[[], float]) -> float:
    """Of one run, over `count` of them."""
    started = clock()
    for _ in range(count):
        run()
    return (clock() - started) / count
