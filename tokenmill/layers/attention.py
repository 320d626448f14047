"""`Attention`: one layer's place in the paged cache and its call of the attention backend."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, FusesDecode, LayerCache, TurnsHeads
from tokenmill.layers.context import LayerContext
from tokenmill.layers.norm import RMSNorm
from tokenmill.layers.rope import Rotation
from tokenmill.ops.fp8 import QuantizedRows
from tokenmill.ops.head_norm import HeadNorm
from tokenmill.quantization.base import RowForm


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
        self._fusing_backend = context.backend if isinstance(context.backend, FusesDecode) else None

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

    def prepare_and_attend(
        self,
        qkv: torch.Tensor,
        rotation: Rotation,
        metadata: AttentionMetadata,
        cache: LayerCache,
        *,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
        form: RowForm = RowForm.PLAIN,
    ) -> torch.Tensor | QuantizedRows:
        """Normalize queries and keys by `norms`, if there are some, and rotate them; then attend.

        Args:
            qkv: [T, H + 2 G, D].
            rotation: of the T tokens.
            metadata: the step.
            cache: of this layer.
            norms: of query and of key heads.
            form: in which the rows [T, H * D] are best returned; they are plain where attention cannot make it.
        """
        num_heads, num_turned = self.spec.num_heads, self.spec.num_heads + self.spec.num_kv_heads
        fusing, turning = self._fusing_backend, self._turning_backend
        if fusing is not None and fusing.fuses(self.spec, cache, metadata):
            factors = None if norms is None else (norms[0].scale, norms[1].scale, norms[0].eps)
            rows = fusing.forward_fused(
                self.spec, qkv, rotation, factors, cache, metadata, quantizes=form is RowForm.QUANTIZED
            )
            return QuantizedRows(*rows) if isinstance(rows, tuple) else rows
        heads, value = qkv[:, :num_turned], qkv[:, num_turned:]
        if norms is None and turning is not None and turning.turns_heads(metadata):
            query, key = heads[:, :num_heads], heads[:, num_heads:]
            return turning.forward(self.spec, query, key, value, cache, metadata, turning=rotation).flatten(1)
        norm = None if norms is None else HeadNorm(norms[0].scale, norms[1].scale, norms[0].eps)
        query, key = rotation.apply_to_heads(heads, num_heads, norm)
        return self(query, key, value, metadata, cache)  # type: ignore[no-any-return]
