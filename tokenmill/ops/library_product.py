"""Products of many rows by the vendor's library: by torch, or by one of cuBLASLt's algorithms where that is faster.

Which one is measured when a shape is first met outside a recording: the library's own guess is often some percent, and
sometimes a sixth slower than its best (docs/log.md, 2026-11-23). Numbers of rows share a choice with those a little
larger. Called by `ops.linear` and `ops.fp8`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from statistics import median
from threading import Lock
from typing import Final

import torch
from torch.nn import functional

from tokenmill.ops.cublas_lt import ALIGNMENT, Algorithm, CublasLtError, Product, ProductShape, is_available

NUM_ALGORITHMS: Final = 8
"""That the library is asked for, for each number of rows."""
NEIGHBOURS: Final = (64, 256)
"""The algorithms for so many rows or the next multiple are tried as well."""
ROUNDS: Final = 5
"""Runs of each candidate; the median counts. The fastest run of large products would be one at full clocks."""
LARGEST_STEP: Final = 1024
"""Numbers of rows above share a choice with all up to the next power of two."""
FACTOR: Final = 0.985
"""An algorithm is taken that needs this part of torch's time or less."""
FLUSHED_BYTES: Final = 48 * 2**20
"""Written between two runs, so that no weight stays in the L2 cache that would not be there in a step."""


@dataclass(slots=True)
class _Choice:
    """For one shape, and numbers of rows that share it; `algorithm` None: torch."""

    is_made: bool = False
    algorithm: Algorithm | None = None
    lock: Lock = field(default_factory=Lock)


def library_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` with x [T, I] and weight [O, I] of one 16-bit type on a GPU: [T, O]."""
    algorithm = _algorithm(x, weight)
    if algorithm is not None:
        out = _new_out(x, weight)
        if _run(algorithm, x, weight, out):
            return out
    return functional.linear(x, weight)


def add_library_product(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Add `x @ weight.T` to `total` [T, O], rounded once."""
    algorithm = _algorithm(x, weight)
    if algorithm is None or not _is_aligned(total) or not _run(algorithm, x, weight, total, adds=True):
        total.addmm_(x, weight.t())


def adds_scaled_product(num_rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """Whether `add_scaled_product` is there for so many float8 rows and a sum of type `dtype`."""
    shape = ProductShape(num_rows, out_features, in_features, torch.float8_e4m3fn, dtype)
    return num_rows > 0 and is_available() and _first_algorithm(shape, torch.cuda.current_device()) is not None


def add_scaled_product(
    total: torch.Tensor, x: torch.Tensor, x_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> bool:
    """Add `(x * x_scales) @ (weight * weight_scales).T` of float8 rows to `total` [T, O], rounded once.

    Returns:
        Whether it was added; not where memory begins at odd addresses.
    """
    shape = _shape(x.shape[0], weight, total.dtype)
    device = torch.cuda.current_device()
    algorithm = _first_algorithm(shape, device)
    if algorithm is None or not all(map(_is_aligned, (total, x, weight))):
        return False
    _product(shape, device).run(algorithm, x, weight, total, scales=(x_scales, weight_scales), adds=True)
    return True


def _algorithm(x: torch.Tensor, weight: torch.Tensor) -> Algorithm | None:
    """The one for x [T, I] and weight [O, I]; measured, unless launches are recorded now. None: torch."""
    if x.shape[0] == 0 or not is_available() or not _is_aligned(x) or not _is_aligned(weight):
        return None
    choice = _choice(_shared_rows(x.shape[0]), *weight.shape, x.dtype, x.device)
    if not choice.is_made and not torch.cuda.is_current_stream_capturing():
        with choice.lock:
            if not choice.is_made:
                with suppress(torch.OutOfMemoryError, CublasLtError):  # torch will do
                    choice.algorithm = _fastest(x, weight)
                choice.is_made = True
    return choice.algorithm


def _fastest(x: torch.Tensor, weight: torch.Tensor) -> Algorithm | None:
    """Time torch and the algorithms for this product, in turns.

    Not with x: an engine starts with steps of padding, whose rows are all alike, and such products take less power.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    x = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    out, flushed = _new_out(x, weight), torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=x.device)
    candidates = _candidates(x, weight, out)
    calls: list[Callable[[], object]] = [partial(torch.mm, x, weight.t(), out=out)]
    calls += [partial(_run, algorithm, x, weight, out) for algorithm in candidates]
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for call in calls:
        call()  # the driver loads its kernel
    for _ in range(ROUNDS):
        for call, pairs in zip(calls, events, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            flushed.zero_()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
    torch.cuda.current_stream(x.device).synchronize()
    torchs, *others = [median(start.elapsed_time(end) for start, end in pairs) for pairs in events]
    if not others or min(others) > FACTOR * torchs:
        return None
    return candidates[others.index(min(others))]


def _candidates(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> list[Algorithm]:
    """What the library would take for this number of rows and some near ones; each is known to run."""
    num_rows = x.shape[0]
    found: dict[bytes, Algorithm] = {}
    for rows in sorted({num_rows, *(-(-num_rows // step) * step for step in NEIGHBOURS)}):
        shape = _shape(rows, weight, x.dtype)
        for algorithm in _product(shape, torch.cuda.current_device()).algorithms(NUM_ALGORITHMS):
            found.setdefault(bytes(algorithm.algorithm), algorithm)
    return [algorithm for algorithm in found.values() if _run(algorithm, x, weight, out)]


def _run(algorithm: Algorithm, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, adds: bool = False) -> bool:
    """Whether the algorithm can do it; then it is launched."""
    shape = _shape(x.shape[0], weight, out.dtype)
    try:
        _product(shape, torch.cuda.current_device()).run(algorithm, x, weight, out, adds=adds)
    except CublasLtError:
        return False
    return True


def _new_out(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _shape(num_rows: int, weight: torch.Tensor, out_dtype: torch.dtype) -> ProductShape:
    return ProductShape(num_rows, weight.shape[0], weight.shape[1], weight.dtype, out_dtype)


def _shared_rows(num_rows: int) -> int:
    """Numbers of rows with the same result share a choice: steps of a sixteenth to an eighth, then powers of two."""
    octave = (num_rows - 1).bit_length()
    step = 1 << (octave if num_rows > LARGEST_STEP else max(0, octave - 4))
    return -(-num_rows // step) * step


def _is_aligned(x: torch.Tensor) -> bool:
    return x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0


@lru_cache(maxsize=4096)
def _choice(rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> _Choice:
    return _Choice()


@lru_cache(maxsize=4096)
def _product(shape: ProductShape, device_index: int) -> Product:
    return Product(shape)


@lru_cache(maxsize=4096)
def _first_algorithm(shape: ProductShape, device_index: int) -> Algorithm | None:
    """The library's best guess; None: it has no such product."""
    try:
        return next(iter(_product(shape, device_index).algorithms(1)), None)
    except CublasLtError:
        return None
