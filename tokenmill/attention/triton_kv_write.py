"""Writes keys and values of a step to the paged cache: one launch for both. Called by `triton.py` for prefill tokens.

Decode rows write their one token inside the decode kernel. float8 caches are divided by the layer's scales.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tokenmill.attention.base import AttentionSpec, LayerCache
from tokenmill.attention.triton_common import StridedHeads, operand_type, strided, to_cached


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def _write_kernel(
    key: StridedHeads,
    value: StridedHeads,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    slot_mapping: tl.tensor,
    key_copy: tl.tensor,
    value_copy: tl.tensor,
    key_scale: float,
    value_scale: float,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block: tl.constexpr,
    copies: tl.constexpr,
) -> None:
    """One program a token: all its heads, keys and values."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    elements = tl.arange(0, block)
    inside = elements < num_heads * head_dim
    head = elements // head_dim
    dim = elements % head_dim
    keys = tl.load(key.data + token * key.token_stride + head * key.head_stride + dim, mask=inside)
    values = tl.load(value.data + token * value.token_stride + head * value.head_stride + dim, mask=inside)
    keys = to_cached(keys, key_scale, key_cache)
    values = to_cached(values, value_scale, value_cache)
    tl.store(key_cache + slot * (num_heads * head_dim) + elements, keys, mask=inside)
    tl.store(value_cache + slot * (num_heads * head_dim) + elements, values, mask=inside)
    if copies:
        offset = token * (num_heads * head_dim)
        tl.store(key_copy + offset + elements, keys.to(key_copy.dtype.element_ty), mask=inside)
        tl.store(value_copy + offset + elements, values.to(value_copy.dtype.element_ty), mask=inside)


def write_kv_triton(
    spec: AttentionSpec,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    slot_mapping: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store each token's key and value, divided by the layer's scales, at its slot.

    Args:
        spec: heads and scales.
        key, value: [T, G, D], any strides but 1 along D.
        cache: two tensors [N, B, G, D], contiguous, of any float type or float8_e4m3fn; changed in place.
        slot_mapping: [T] int64.

    Returns:
        The keys and values as a later step will read them, but for the scales: what was rounded to the cache's type
        and is back in the type of computation, [T, G, D] each. `key` and `value` themselves if nothing is rounded.
    """
    num_tokens, num_heads, head_dim = key.shape
    key_cache, value_cache = cache
    rounds = key_cache.dtype != key.dtype or spec.key_scale != 1.0 or spec.value_scale != 1.0
    key_copy, value_copy = key, value
    if rounds:
        copies = key.new_empty(2, *key.shape, dtype=operand_type(key.dtype, key_cache.dtype))
        key_copy, value_copy = copies.unbind(0)
    if num_tokens:
        _write_kernel[(num_tokens,)](
            strided(key),
            strided(value),
            key_cache,
            value_cache,
            slot_mapping,
            key_copy,
            value_copy,
            spec.key_scale,
            spec.value_scale,
            num_heads=num_heads,
            head_dim=head_dim,
            block=triton.next_power_of_2(num_heads * head_dim),
            copies=rounds,
        )
    return key_copy, value_copy
