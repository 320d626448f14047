"""A layer's paged cache in the layout of the CPU kernels, made from a `PagedSequences` and the metadata of a step."""

from __future__ import annotations

import math

import torch

from tokenmill.attention.base import AttentionMetadata, LayerCache
from tokenmill.ops.cpu.cache_layout import CacheLocation, cache_shapes, round_up


class NativeCache:
    """Packed copies of keys and values, a block of both beside something else, and the step's rows."""

    def __init__(self, cache: LayerCache, metadata: AttentionMetadata) -> None:
        self.tokens_per_block, self.head_dim = cache[0].shape[1], cache[0].shape[3]
        keys, values = pack_cache(*cache)
        size = keys[0].numel()
        blocks = torch.cat([keys.flatten(1), values.flatten(1), torch.full_like(values.flatten(1), math.nan)], 1)
        self.keys, self.values = blocks[:, :size].view(keys.shape), blocks[:, size : 2 * size].view(values.shape)
        self.metadata = metadata
        tables = metadata.block_tables
        addresses = [metadata.query_start.data_ptr(), metadata.kv_lens.data_ptr(), tables.data_ptr()]
        self.step = torch.tensor([len(metadata.query_lens), *addresses, tables.stride(0) * 4], dtype=torch.int64)

    @property
    def location(self) -> CacheLocation:
        """Where it lies."""
        return CacheLocation(
            self.keys.data_ptr(),
            self.values.data_ptr(),
            self.keys.stride(0) * self.keys.itemsize,
            self.keys.dtype == torch.bfloat16,
            self.tokens_per_block,
            self.step.data_ptr(),
        )

    def unpacked(self) -> LayerCache:
        """Keys and values, [N, B, G, D] each."""
        return unpack_cache(self.keys, self.values, self.tokens_per_block, self.head_dim)


def pack_cache(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The layout of [N, B, G, D] keys and values, which are float32 or bfloat16; padding is zero."""
    num_blocks, tokens_per_block, num_kv_heads, head_dim = keys.shape
    cache_shapes(num_blocks, tokens_per_block, num_kv_heads, head_dim, keys.dtype)  # checks
    padding = (0, round_up(head_dim) - head_dim, 0, 0, 0, round_up(tokens_per_block) - tokens_per_block)
    keys, values = (torch.nn.functional.pad(part, padding).transpose(1, 2) for part in (keys, values))  # [N, G, B, D]
    if keys.dtype == torch.float32:
        return keys.transpose(2, 3).contiguous(), values.contiguous()
    paired_keys = keys.reshape(*keys.shape[:3], -1, 2).permute(0, 1, 3, 2, 4)
    paired_values = values.reshape(*values.shape[:2], -1, 2, values.shape[3]).permute(0, 1, 2, 4, 3)
    return paired_keys.contiguous(), paired_values.contiguous()


def unpack_cache(
    keys: torch.Tensor, values: torch.Tensor, tokens_per_block: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `pack_cache` was given."""
    if keys.dtype == torch.bfloat16:
        keys = keys.permute(0, 1, 2, 4, 3).flatten(2, 3)
        values = values.permute(0, 1, 2, 4, 3).flatten(2, 3)
    keys, values = keys.permute(0, 3, 1, 2), values.transpose(1, 2)
    return tuple(part[:, :tokens_per_block, :, :head_dim].contiguous() for part in (keys, values))


def clear_partners(cache: LayerCache, metadata: AttentionMetadata) -> None:
    """What writing the last token of a row does to the other value of its pair."""
    tokens_per_block = cache[0].shape[1]
    for row, kv_len in enumerate(metadata.kv_lens_host):
        block, cell = divmod(kv_len - 1, tokens_per_block)
        if cell % 2 == 0 and cell + 1 < tokens_per_block:
            cache[1][metadata.block_tables[row, block], cell + 1] = 0
