"""The paged cache's memory: two tensors (keys, values) for each layer."""

from __future__ import annotations

import torch

from tokenmill.attention.base import LayerCache


def allocate_caches(
    num_layers: int,
    num_blocks: int,
    tokens_per_block: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[LayerCache, ...]:
    """Keys and values of all layers, each [num_blocks, tokens_per_block, num_kv_heads, head_dim], not initialized.

    Attention never looks at what a sequence has not written. On a CPU the pages take memory only when first written.
    """
    shape = (num_blocks, tokens_per_block, num_kv_heads, head_dim)
    return tuple(
        (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
        for _ in range(num_layers)
    )
