"""The most likely token of each row of logits, written to where the next step reads it. For `sampling.sampler`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import torch


class TokenPlaces(NamedTuple):
    """Where the tokens of R rows go.

    Args:
        token_ids: [S, L] int64, the tokens of all slots.
        slots, positions: [R] int64; distinct, but for those of the scratch slot.
    """

    token_ids: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor


MostLikely: TypeAlias = Callable[[torch.Tensor, TokenPlaces | None], tuple[torch.Tensor, torch.Tensor]]


def most_likely(logits: torch.Tensor, places: TokenPlaces | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(token [R] int64, invalid [R] bool) of logits [R, V] of any float type; of equally likely tokens the first.

    A row with NaN, or whose largest logit is infinite, is invalid and gets the token 0.

    Args:
        logits: unit stride along V.
        places: where the tokens are written as well, token 0 of invalid rows included.
    """
    return IMPLEMENTATIONS[choose(logits.device)](logits, places)


def most_likely_torch(logits: torch.Tensor, places: TokenPlaces | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: `max` takes NaN for the largest."""
    largest, index = logits.max(dim=-1)
    invalid = ~largest.isfinite()
    token_ids = index.masked_fill(invalid, 0)
    if places is not None:
        places.token_ids[places.slots, places.positions] = token_ids
    return token_ids, invalid


def most_likely_triton(logits: torch.Tensor, places: TokenPlaces | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Two launches: the largest of parts of each row, then of those."""
    from tokenmill.ops.triton import argmax as kernels

    return kernels.most_likely(logits, *(places or (None, None, None)))


IMPLEMENTATIONS: Mapping[str, MostLikely] = MappingProxyType({"torch": most_likely_torch, "triton": most_likely_triton})


def choose(device: torch.device) -> str:
    """Name of the implementation for logits on this device."""
    return "triton" if device.type == "cuda" else "torch"
