"""The largest number of each row and where it is. Called by `sampling.sampler` on logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch

Argmax: TypeAlias = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

NUM_PARTS = 32
"""Parts of a row that are searched beside each other where there are few rows."""
MAX_ROWS_IN_PARTS = 32


def argmax(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest [R], its index [R] int64) of x [R, V]; of equal ones the first; NaN counts as the largest."""
    return IMPLEMENTATIONS[choose(x)](x)


def argmax_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One search through each row."""
    largest, index = x.max(dim=-1)
    return largest, index


def argmax_in_parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each part, then the largest of those: a GPU gives each row to a few of its blocks only."""
    of_parts, index_in_part = x.unflatten(1, (NUM_PARTS, -1)).max(dim=-1)  # type: ignore[no-untyped-call]  # [R, parts]
    largest, part = of_parts.max(dim=-1)
    index = index_in_part.gather(1, part[:, None]).squeeze(1) + part * (x.shape[1] // NUM_PARTS)
    return largest, index


IMPLEMENTATIONS: Mapping[str, Argmax] = MappingProxyType({"torch": argmax_torch, "parts": argmax_in_parts})


def choose(x: torch.Tensor) -> str:
    """Name of the implementation for x [R, V]."""
    num_rows, size = x.shape
    in_parts = x.is_cuda and 0 < num_rows <= MAX_ROWS_IN_PARTS and size % NUM_PARTS == 0 and size > NUM_PARTS
    return "parts" if in_parts else "torch"
