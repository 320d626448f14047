"""Products of many rows by the vendor's library: by torch, or by one of cuBLASLt's algorithms where that is faster.

The library's own guess is often some percent, and sometimes a sixth slower than its best (docs/log.md, 2026-11-23), so
`measure_products` times the shapes that have been met so far: when an engine starts and nothing else runs. Shapes that
are met later are left to torch. Numbers of rows share a choice with those a little larger. Called by `ops.linear`
and `ops.fp8`, and by the runtime to measure.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import median
from typing import Final
from weakref import ReferenceType, ref

import torch
from torch.nn import functional

from tokenmill.ops.cublas_lt import ALIGNMENT, Algorithm, CublasLtError, Product, ProductShape, is_available

NUM_ALGORITHMS: Final = 8
"""That the library is asked for, for each number of rows."""
NEIGHBOURS: Final = (64, 256)
"""The algorithms for so many rows or the next multiple are tried as well."""
ROUNDS: Final = 5
"""Runs of each candidate; the median counts. The fastest run of large products would be one at full clocks."""
HOPELESS: Final = 1.25
"""Candidates that take so many times as long as the fastest in the first round are not run again."""
LARGEST_STEP: Final = 1024
"""Numbers of rows above share a choice with all up to the next power of two."""
FACTOR: Final = 0.985
"""An algorithm is taken that needs this part of torch's time or less."""
FLUSHED_BYTES: Final = 48 * 2**20
"""Written between two runs, so that no weight stays in the L2 cache that would not be there in a step."""


@dataclass(slots=True)
class _Choice:
    """For one shape, and numbers of rows that share it.

    Args:
        num_rows: of the product that was met first.
        weight: of it.
        is_made: whether it was measured.
        algorithm: the fastest; None: torch.
    """

    num_rows: int
    weight: ReferenceType[torch.Tensor]
    is_made: bool = False
    algorithm: Algorithm | None = None


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


def measure_products(device: torch.device) -> None:
    """Choose for all shapes that were met on a device and not measured yet. Nothing else should run there meanwhile."""
    for choice in list(_choices(device).values()):
        weight = choice.weight()
        if not choice.is_made and weight is not None:
            with suppress(torch.OutOfMemoryError, CublasLtError):  # torch will do
                choice.algorithm = _fastest(choice.num_rows, weight)
            choice.is_made = True


def _algorithm(x: torch.Tensor, weight: torch.Tensor) -> Algorithm | None:
    """The one for x [T, I] and weight [O, I]; None: torch, as long as this shape is not measured."""
    num_rows = x.shape[0]
    if num_rows == 0 or not is_available() or not _is_aligned(x) or not _is_aligned(weight):
        return None
    key = _shared_rows(num_rows), *weight.shape, x.dtype
    choices = _choices(x.device)
    choice = choices.get(key)
    if choice is None or (not choice.is_made and choice.weight() is None):
        choice = choices[key] = _Choice(num_rows, ref(weight))
    return choice.algorithm


def _fastest(num_rows: int, weight: torch.Tensor) -> Algorithm | None:
    """Time torch and the algorithms for `num_rows` rows by weight [O, I], in turns.

    The rows are random: an engine starts with steps of padding, whose rows are all alike, and such products take less
    power.
    """
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(num_rows, weight.shape[1], dtype=weight.dtype, device=weight.device, generator=generator)
    out, flushed = _new_out(x, weight), torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=x.device)
    candidates = _candidates(x, weight, out)
    calls: list[Callable[[], object]] = [partial(torch.mm, x, weight.t(), out=out)]
    calls += [partial(_run, algorithm, x, weight, out) for algorithm in candidates]
    for call in calls:
        call()  # the driver loads its kernel
    first = [_milliseconds(call, flushed) for call in calls]
    kept = [index for index, time in enumerate(first) if index == 0 or time <= HOPELESS * min(first)]
    rounds = [[_milliseconds(calls[index], flushed) for index in kept] for _ in range(ROUNDS)]
    torchs, *others = (median(times) for times in zip(*rounds, strict=True))
    if not others or min(others) > FACTOR * torchs:
        return None
    return candidates[kept[1 + others.index(min(others))] - 1]


def _milliseconds(call: Callable[[], object], flushed: torch.Tensor) -> float:
    """On the device, with weights that are not in its L2 cache."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    flushed.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


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


@lru_cache(maxsize=64)
def _choices(device: torch.device) -> dict[tuple[int, int, int, torch.dtype], _Choice]:
    """Of all shapes that were met, by rows, features and type."""
    return {}


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
