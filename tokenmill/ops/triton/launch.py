"""What the wrappers of kernels share: tensors as rows, warps for a block of elements, and overlapping launches.

A launch that overlaps (programmatic dependent launch, Hopper and later) may begin while the kernel before it still
runs. Our kernels then do two things first: they let the next kernel begin, and they wait until all kernels before them
are complete. Between the two they touch nothing but weights, which no kernel of a step writes. Whoever writes weights
with a kernel of ours must put another launch, such as any of torch's, before their first use.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

from tokenmill.ops.platform import is_hopper_or_newer

ELEMENTS_PER_THREAD = 16
MAX_WARPS = 32


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] as [rows, D] with unit stride along D; a view wherever there is one."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def warps_for(num_elements: int) -> int:
    """Warps of a program that holds `num_elements` (a power of two) in registers."""
    return max(1, min(MAX_WARPS, num_elements // (32 * ELEMENTS_PER_THREAD)))


def is_interpreted() -> bool:
    """Whether kernels run in triton's interpreter, on the CPU, instead of being compiled."""
    return bool(triton.knobs.runtime.interpret)


@lru_cache(maxsize=64)
def can_overlap(device: torch.device) -> bool:
    """Whether kernels on the device may begin before the kernel before them has ended."""
    return not is_interpreted() and is_hopper_or_newer(device)
