"""`ForwardBatch`: the one argument of `model.forward`, built by the runner once a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenmill.attention.base import AttentionMetadata, LayerCache


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """T tokens of R sequences, concatenated.

    Args:
        input_ids: [T] int64.
        positions: [T] int64, each token's position in its sequence.
        attention: the step as attention sees it.
        caches: keys and values of each layer.
        wanted: [n] int64, indices of the tokens whose hidden states are returned; None: all. Behind the last layer's
            attention nothing is computed of the others.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata
    caches: tuple[LayerCache, ...]
    wanted: torch.Tensor | None = None


def wanted_rows(x: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    """The rows of x [T, ...] at `wanted` [n]; None: x itself."""
    return x if wanted is None else x.index_select(0, wanted)
