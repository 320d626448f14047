"""Measures what a program's kernels leave open, with the timing cache of `BuildConfig` behind it."""

from __future__ import annotations

from collections.abc import Callable

from tokenmill.builder.linear_tuning import linear_tunables
from tokenmill.builder.tuning import TuningReport, tune
from tokenmill.config import BuildConfig
from tokenmill.errors import EngineFileError
from tokenmill.ops.cpu.machine import machine_key
from tokenmill.ops.platform import num_usable_cores
from tokenmill.program.engine_config import LimitsRecord
from tokenmill.program.program import Program
from tokenmill.program.timing_cache import TimingCache, common_timing_cache


def tune_program(
    config: BuildConfig, program: Program, limits: LimitsRecord, on_progress: Callable[[int, int], None]
) -> TuningReport:
    """Times of the variants of all kernels of `program`; what was measured is added to the timing cache.

    Raises:
        EngineFileError: the file that `config.timing_cache` names is no timing cache or cannot be written.
    """
    path = config.timing_cache or common_timing_cache()
    known = TimingCache.load(path)
    num_threads = config.num_threads or num_usable_cores()
    profiles = [num_tokens for num_tokens in config.profiles if num_tokens <= limits.max_num_tokens]
    with linear_tunables(program, profiles, limits.max_num_rows, num_threads) as tunables:
        report = tune(tunables, known, machine_key(num_threads), on_progress)
    if report.num_measured:
        try:
            report.cache.save_into(path)
        except EngineFileError:
            if config.timing_cache is not None:
                raise  # the user named it; the common one is only a convenience
    return report
