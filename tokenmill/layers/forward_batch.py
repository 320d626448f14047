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
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata
    caches: tuple[LayerCache, ...]
