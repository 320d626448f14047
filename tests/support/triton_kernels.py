"""What tests of Triton kernels share: tables of implementations without them, poisoned memory, an error measure.

Kernels run in triton's interpreter on the CPU where there is no GPU; a conftest sets `TRITON_INTERPRET` for its folder.
The interpreter cuts bfloat16 off instead of rounding it, so on the CPU results may be one unit in the last place lower.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

_EMPTY = torch.empty
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""Of `relative_error`, by the type of the result."""


def without_triton(table: Iterable[str]) -> list[str]:
    """The implementations that take tensors of the CPU."""
    return [name for name in table if name != "triton"]


def poisoned_empty(*args: Any, **options: Any) -> torch.Tensor:
    """`torch.empty` whose memory is all ones, which is NaN in every float type: what is not written will show."""
    tensor = _EMPTY(*args, **options)
    if tensor.numel():
        tensor.view(torch.uint8).fill_(255)
    return tensor


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; shapes must agree, NaN is never within a tolerance."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))
