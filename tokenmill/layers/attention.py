"""`Attention`: one layer's place in the paged cache and its call of the attention backend."""

from __future__ import annotations

import torch
from torch import nn

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.layers.context import LayerContext


class Attention(nn.Module):
    """Attention of this rank's heads over the paged cache.

    Args:
        spec: heads, scale, window and soft cap of this layer.
        context: names the backend.
    """

    def __init__(self, spec: AttentionSpec, context: LayerContext) -> None:
        super().__init__()
        self.spec = spec
        self.backend = context.backend

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
        cache: LayerCache,
    ) -> torch.Tensor:
        """query [T, H, D], key and value [T, G, D], rotated already; returns [T, H * D]."""
        return self.backend.forward(self.spec, query, key, value, cache, metadata).flatten(1)
