"""Products of many rows by the vendor's library: by torch, or by one of cuBLASLt's algorithms where that is faster.

The library's own guess is often some percent, and sometimes a sixth slower than its best (docs/log.md, 2026-11-23). So
shapes are noted when they are met, in the first steps of an engine, and `measure_products` chooses for them while
nothing else runs: what an earlier start measured on such a machine is read (`product_choices`), the rest is measured
(`product_timing`) and kept for the next start. Shapes that are met later are left to torch. Called by `ops.linear` and
`ops.fp8`, and by the runtime to measure.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from functools import lru_cache
from typing import Final
from weakref import ReferenceType, ref

import torch
from torch.nn import functional

from tokenmill.ops.cublas_lt import (
    Algorithm,
    CublasLtError,
    ProductShape,
    gpu_machine,
    is_aligned,
    is_available,
    launches,
    product_of,
    product_shape,
)
from tokenmill.ops.product_choices import ProductChoices, ProductKey, shared_rows
from tokenmill.ops.product_timing import Candidates

logger = logging.getLogger(__name__)

_DTYPE_NAMES: Final = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


class _DeviceProducts:
    """Of one device: algorithms by product (None: torch), and a weight of each product that has no choice yet."""

    def __init__(self) -> None:
        self.chosen: dict[ProductKey, Algorithm | None] = {}
        self.met: dict[ProductKey, ReferenceType[torch.Tensor]] = {}


def library_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` with x [T, I] and weight [O, I] of one 16-bit type on a GPU: [T, O]."""
    algorithm = _algorithm(x, weight)
    if algorithm is not None:
        out = x.new_empty(x.shape[0], weight.shape[0])
        if launches(algorithm, x, weight, out):
            return out
    return functional.linear(x, weight)


def add_library_product(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Add `x @ weight.T` to `total` [T, O], rounded once."""
    algorithm = _algorithm(x, weight)
    if algorithm is None or not is_aligned(total) or not launches(algorithm, x, weight, total, adds=True):
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
    shape = product_shape(x.shape[0], weight, total.dtype)
    device = torch.cuda.current_device()
    algorithm = _first_algorithm(shape, device)
    if algorithm is None or not all(map(is_aligned, (total, x, weight))):
        return False
    product_of(shape, device).run(algorithm, x, weight, total, scales=(x_scales, weight_scales), adds=True)
    return True


def measure_products(device: torch.device) -> None:
    """Choose for all shapes that were met on a device since the last call. Nothing else should run there meanwhile.

    A choice that was read is taken only if the library offers its algorithm for this product here and now; nothing
    that a file says reaches the library.
    """
    products = _products(device)
    met = [(product, weight()) for product, weight in products.met.items()]
    products.met.clear()
    if not met:
        return
    started, num_read = time.monotonic(), 0
    machine = gpu_machine(device)
    read, measured = ProductChoices.load(machine).by_product, ProductChoices(machine)
    for product, weight in met:
        if weight is None:
            continue  # another one of this shape will be met
        products.chosen[product] = None
        with suppress(torch.OutOfMemoryError, CublasLtError):  # torch will do
            candidates, choice = Candidates(product, weight), read.get(product)
            if choice is not None and candidates.runs(choice.algorithm):
                num_read += 1
            else:
                choice = candidates.fastest()
                measured.choices.append(choice)
            products.chosen[product] = candidates.algorithms[choice.algorithm] if choice.algorithm else None
    if measured.choices:
        measured.save()
    logger.info(
        "The fastest algorithms of products: %d were read, %d measured, in %.2f s.",
        num_read, len(measured.choices), time.monotonic() - started,
    )  # fmt: skip


def _algorithm(x: torch.Tensor, weight: torch.Tensor) -> Algorithm | None:
    """The one for x [T, I] and weight [O, I]; None: torch, as long as there is no choice for this shape."""
    if x.shape[0] == 0 or not is_available() or not is_aligned(x) or not is_aligned(weight):
        return None
    product = ProductKey(shared_rows(x.shape[0]), weight.shape[0], weight.shape[1], _DTYPE_NAMES[x.dtype])
    products = _products(x.device)
    if product not in products.chosen:
        products.met[product] = ref(weight)
    return products.chosen.get(product)


@lru_cache(maxsize=64)
def _products(device: torch.device) -> _DeviceProducts:
    return _DeviceProducts()


@lru_cache(maxsize=4096)
def _first_algorithm(shape: ProductShape, device_index: int) -> Algorithm | None:
    """The library's best guess; None: it has no such product."""
    try:
        return next(iter(product_of(shape, device_index).algorithms(1)), None)
    except CublasLtError:
        return None
