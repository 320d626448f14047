"""`Candidates`: what can multiply a product on this GPU, and which of it is fastest.

An engine measures what `product_choices` has no choice for. Called by `ops.library_product`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Final

import torch

from tokenmill.ops.cublas_lt import Algorithm, launches, product_of, product_shape
from tokenmill.ops.product_choices import ProductChoice, ProductKey

NUM_ALGORITHMS: Final = 8
"""That the library is asked for, for each number of rows."""
NEIGHBOURS: Final = (64, 256)
"""The algorithms for so many rows or the next multiple are tried as well."""
ROUNDS: Final = 5
"""Runs of each candidate; the median counts. The fastest run of large products would be one at full clocks."""
HOPELESS: Final = 1.25
"""Candidates that take so many times as long as the fastest in the first round are not run again."""
FACTOR: Final = 0.95
"""An algorithm is taken that needs this part of torch's time or less: alone and in a step times differ by some percent,
so what is hardly faster may be slower (docs/log.md, 2026-11-23)."""
FLUSHED_BYTES: Final = 48 * 2**20
"""Written between two runs, so that no weight stays in the L2 cache that would not be there in a step."""
NUM_FLUSHES: Final = 12
"""They take the device longer than the host needs to launch what is measured, or its time would be the host's."""


class Candidates:
    """torch, and the algorithms that the library names for this number of rows and some near ones.

    The rows are random: an engine starts with steps of padding, whose rows are all alike, and such products take less
    power.

    Args:
        product: what is multiplied; its number of rows is used.
        weight: [O, I].

    Raises:
        OutOfMemoryError: there is no room for rows and results.
        CublasLtError: the library does not know such products.
    """

    def __init__(self, product: ProductKey, weight: torch.Tensor) -> None:
        self._product = product
        self._weight = weight
        generator = torch.Generator(weight.device).manual_seed(0)
        size = product.num_rows, product.in_features
        self._x = torch.randn(size, dtype=weight.dtype, device=weight.device, generator=generator)
        self._out = weight.new_empty(product.num_rows, product.out_features)
        self.algorithms: dict[bytes, Algorithm] = {}
        for rows in sorted({product.num_rows, *(-(-product.num_rows // step) * step for step in NEIGHBOURS)}):
            shape = product_shape(rows, weight, weight.dtype)
            for algorithm in product_of(shape, torch.cuda.current_device()).algorithms(NUM_ALGORITHMS):
                self.algorithms.setdefault(bytes(algorithm.algorithm), algorithm)

    def runs(self, algorithm: bytes | None) -> bool:
        """Whether it is one of them and can compute the product. It is launched: the driver loads its kernel."""
        if algorithm is None:
            return True
        return algorithm in self.algorithms and self._launches(self.algorithms[algorithm])

    def fastest(self) -> ProductChoice:
        """By the median of several runs, all candidates in turns."""
        algorithms = [algorithm for algorithm in self.algorithms.values() if self._launches(algorithm)]
        calls: list[Callable[[], object]] = [partial(torch.mm, self._x, self._weight.t(), out=self._out)]
        calls += [partial(self._launches, algorithm) for algorithm in algorithms]
        calls[0]()  # the driver loads its kernel
        flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=self._x.device)
        first = [_microseconds(call, flushed) for call in calls]
        kept = [index for index, time in enumerate(first) if index == 0 or time <= HOPELESS * min(first)]
        rounds = [[_microseconds(calls[index], flushed) for index in kept] for _ in range(ROUNDS)]
        times = dict(zip(kept, map(median, zip(*rounds, strict=True)), strict=True))
        best = min(times, key=lambda index: times[index])
        if times[best] > FACTOR * times[0]:
            return ProductChoice(self._product, None, "", times[0], times[0])
        algorithm = algorithms[best - 1]
        return ProductChoice(self._product, bytes(algorithm.algorithm), algorithm.name(), times[best], times[0])

    def _launches(self, algorithm: Algorithm) -> bool:
        return launches(algorithm, self._x, self._weight, self._out)


def _microseconds(call: Callable[[], object], flushed: torch.Tensor) -> float:
    """On the device, with weights that are not in its L2 cache."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for _ in range(NUM_FLUSHES):
        flushed.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e3 * float(start.elapsed_time(end))
