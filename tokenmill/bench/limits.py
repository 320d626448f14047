"""`measure_limits`: how fast the device reads its memory and multiplies matrices, measured here and now."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

READ_BYTES = 1 << 30
"""Read at a time on a GPU, many times its cache."""
MATRIX_SIZE = 8192
REPEATS = 5


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What bounds any kernel.

    Args:
        read_bandwidth: bytes a second.
        flops: of matrix products in the model's type, operations a second.
    """

    read_bandwidth: float
    flops: float


def measure_limits(device: torch.device, *, float8: bool = False) -> DeviceLimits:
    """Measure, on an idle device.

    Args:
        device: a GPU with 2 GiB to spare; with less, smaller tensors are used.
        float8: multiply float8_e4m3fn in the place of bfloat16.
    """
    spare = torch.cuda.mem_get_info(device)[0] // 4
    bandwidth = _read_bandwidth(min(READ_BYTES, max(1 << 20, spare)), device)
    size = MATRIX_SIZE if spare >= 8 * MATRIX_SIZE**2 else 1024
    return DeviceLimits(bandwidth, 2 * size**3 / _seconds(_product(size, device, float8)))


def _read_bandwidth(num_bytes: int, device: torch.device) -> float:
    """The faster of a copy, which reads and writes half of the bytes each, and a reduction."""
    source = torch.randint(0, 255, (num_bytes // 2,), dtype=torch.uint8, device=device).view(torch.int32)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _seconds(lambda: target.copy_(source))
    return max(copied, source.nbytes / _seconds(source.amax))


def _product(size: int, device: torch.device, float8: bool) -> Callable[[], object]:
    """A product of two random matrices."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    if not float8:
        return lambda: a @ b
    one = torch.ones((), device=device)
    x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    return lambda: torch._scaled_mm(x, y, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _seconds(call: Callable[[], object]) -> float:
    """Of one call on the device; the median."""
    call()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return statistics.median(times)
