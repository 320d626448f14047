"""What the wrappers of row-wise kernels share: tensors as rows, and how many warps a block of elements gets."""

from __future__ import annotations

import torch
import triton

ELEMENTS_PER_THREAD = 16
MAX_WARPS = 16


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] as [rows, D] with unit stride along D; a view wherever there is one."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def warps_for(num_elements: int) -> int:
    """Warps of a program that holds `num_elements` (a power of two) in registers."""
    return max(1, min(MAX_WARPS, num_elements // (32 * ELEMENTS_PER_THREAD)))


def is_interpreted() -> bool:
    """Whether kernels run in triton's interpreter, which knows no inline assembly."""
    return bool(triton.knobs.runtime.interpret)
