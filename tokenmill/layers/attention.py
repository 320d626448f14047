"""`Attention`: one layer's place in the paged cache and its call of the attention backend."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache, TurnsHeads
from tokenmill.layers.context import LayerContext
from tokenmill.layers.rope import Rotation


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
        self._turning_backend = context.backend if isinstance(context.backend, TurnsHeads) else None

    def use_cache_scales(self, key: float, value: float) -> None:
        """Cached keys and values are divided by these from now on, and multiplied again when they are read."""
        self.spec = replace(self.spec, key_scale=key, value_scale=value)

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

    def turn_and_attend(
        self, qkv: torch.Tensor, rotation: Rotation, metadata: AttentionMetadata, cache: LayerCache
    ) -> torch.Tensor:
        """qkv [T, H + 2 G, D], whose queries and keys are not rotated yet; returns [T, H * D]."""
        num_heads, num_turned = self.spec.num_heads, self.spec.num_heads + self.spec.num_kv_heads
        heads, value = qkv[:, :num_turned], qkv[:, num_turned:]
        backend = self._turning_backend
        if backend is not None and backend.turns_heads(metadata):
            query, key = heads[:, :num_heads], heads[:, num_heads:]
            return backend.forward(self.spec, query, key, value, cache, metadata, turning=rotation).flatten(1)
        heads = rotation.apply(heads)
        return self(heads[:, :num_heads], heads[:, num_heads:], value, metadata, cache)  # type: ignore[no-any-return]
