"""`reference`: attention over the paged cache as it is defined, one row at a time in float32. What tests trust."""

from __future__ import annotations

import torch

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.ops.kv_cache import write_kv_reference


class ReferenceAttention:
    """Readable and slow; runs on any device."""

    name = "reference"

    def forward(
        self,
        spec: AttentionSpec,
        query: torch.Tensor,  # [T, H, D]
        key: torch.Tensor,  # [T, G, D]
        value: torch.Tensor,  # [T, G, D]
        cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:  # [T, H, D]
        """See `AttentionBackend.forward`."""
        key_cache, value_cache = cache
        write_kv_reference(
            key.float() / spec.key_scale,
            value.float() / spec.value_scale,
            key_cache,
            value_cache,
            metadata.slot_mapping,
        )
        tokens_per_block = key_cache.shape[1]
        output = torch.empty_like(query)
        start = 0
        for row, (query_len, kv_len) in enumerate(zip(metadata.query_lens, metadata.kv_lens_host, strict=True)):
            num_blocks = -(-kv_len // tokens_per_block)
            block_table = metadata.block_tables[row, :num_blocks].long()
            keys = key_cache[block_table].flatten(0, 1)[:kv_len].float() * spec.key_scale  # [L, G, D]
            values = value_cache[block_table].flatten(0, 1)[:kv_len].float() * spec.value_scale
            rows = slice(start, start + query_len)
            output[rows] = attend(spec, query[rows], keys, values).to(query.dtype)
            start += query_len
        return output


def attend(spec: AttentionSpec, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last Q positions of one sequence, in float32.

    Args:
        spec: scale, window, soft cap.
        query: [Q, H, D], the last Q of L positions.
        keys, values: [L, G, D].

    Returns:
        [Q, H, D] float32.
    """
    num_queries, num_keys = query.shape[0], keys.shape[0]
    heads_per_group = spec.num_heads // spec.num_kv_heads
    keys = keys.float().repeat_interleave(heads_per_group, dim=1)  # [L, H, D]
    values = values.float().repeat_interleave(heads_per_group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * spec.scale
    if spec.soft_cap is not None:
        scores = torch.tanh(scores / spec.soft_cap) * spec.soft_cap
    key_positions = torch.arange(num_keys, device=query.device)
    query_positions = key_positions[num_keys - num_queries :, None]
    visible = key_positions <= query_positions
    if spec.sliding_window is not None:
        visible &= key_positions > query_positions - spec.sliding_window
    probabilities = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    return torch.einsum("hqk,khd->qhd", probabilities, values)
