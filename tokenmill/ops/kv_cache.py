"""Writes to the paged cache of keys and values: this step's tokens, and whole blocks for copy-on-write.

Shapes: T tokens, G key/value heads, D head size, N blocks, B tokens per block. A slot is `block * B + offset`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import torch

CopyBlocks: TypeAlias = Callable[[Sequence[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor], None]
WriteKv: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Store each token's key and value at its slot, converted to the cache's type.

    Args:
        key, value: [T, G, D].
        key_cache, value_cache: [N, B, G, D], contiguous; changed in place.
        slot_mapping: [T] int64; slots are distinct, but for those of scratch block 0.
    """
    IMPLEMENTATIONS[choose(key.device, key.dtype)](key, value, key_cache, value_cache, slot_mapping)


def write_kv_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """The definition of `write_kv`: one token at a time."""
    tokens_per_block = key_cache.shape[1]
    key, value = _rounded(key, key_cache.dtype), _rounded(value, value_cache.dtype)
    for token, slot in enumerate(slot_mapping.tolist()):
        block, offset = divmod(slot, tokens_per_block)
        key_cache[block, offset] = key[token]
        value_cache[block, offset] = value[token]


def write_kv_torch(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """One indexed copy for the keys and one for the values."""
    key_cache.flatten(0, 1).index_copy_(0, slot_mapping, key.to(key_cache.dtype))
    value_cache.flatten(0, 1).index_copy_(0, slot_mapping, value.to(value_cache.dtype))


def copy_blocks(
    caches: Sequence[tuple[torch.Tensor, torch.Tensor]], source: torch.Tensor, destination: torch.Tensor
) -> None:
    """Copy whole blocks in every layer: block `source[i]` to block `destination[i]`.

    Args:
        caches: (keys, values) of each layer, [N, B, G, D] each; changed in place.
        source, destination: [number of copies] int64; no block is both a source and a destination.
    """
    COPY_IMPLEMENTATIONS[choose_copy(source.device)](caches, source, destination)


def copy_blocks_torch(
    caches: Sequence[tuple[torch.Tensor, torch.Tensor]], source: torch.Tensor, destination: torch.Tensor
) -> None:
    """One indexed copy for each cache tensor."""
    for key_cache, value_cache in caches:
        key_cache.index_copy_(0, destination, key_cache.index_select(0, source))
        value_cache.index_copy_(0, destination, value_cache.index_select(0, source))


def copy_blocks_triton(
    caches: Sequence[tuple[torch.Tensor, torch.Tensor]], source: torch.Tensor, destination: torch.Tensor
) -> None:
    """All layers in one launch; layers of different layouts (sliding and full ones, say) one launch for each layout."""
    from tokenmill.ops.triton import kv_cache as kernels

    by_layout: dict[tuple[object, ...], list[torch.Tensor]] = {}
    for tensor in (tensor for cache in caches for tensor in cache):
        by_layout.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
    for alike in by_layout.values():
        kernels.copy_blocks(alike, source, destination)


COPY_IMPLEMENTATIONS: Mapping[str, CopyBlocks] = MappingProxyType(
    {"torch": copy_blocks_torch, "triton": copy_blocks_triton}
)


def choose_copy(device: torch.device) -> str:
    """Name of the implementation of `copy_blocks` for caches on this device."""
    return "triton" if device.type == "cuda" else "torch"


IMPLEMENTATIONS: Mapping[str, WriteKv] = MappingProxyType({"reference": write_kv_reference, "torch": write_kv_torch})


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation for tensors of this device and type."""
    return "torch"


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in the cache's type; what is beyond the range of float8 becomes its largest value (torch 2.11 makes it NaN)."""
    if dtype.itemsize == 1:
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype)
