"""Writes keys and values of a step to the paged cache: one launch for both. Called by `triton.py` for prefill tokens.

Decode rows write their one token inside the decode kernel. Keys can be turned on the way (rotary embedding). float8
caches are divided by the layer's scales.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tokenmill.attention.base import AttentionSpec, LayerCache
from tokenmill.attention.triton_common import (
    StridedHeads,
    Turning,
    load_tile,
    operand_type,
    strided,
    to_cached,
    turned_halves,
)

BLOCK_TOKENS = 64
"""Of a program that writes one head."""


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def _write_kernel(
    key: StridedHeads,
    value: StridedHeads,
    turning: Turning | None,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    slot_mapping: tl.tensor,
    key_copy: tl.tensor | None,
    value_copy: tl.tensor | None,
    key_scale: float,
    value_scale: float,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program a token: all its heads, keys and values."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    elements = tl.arange(0, block)
    inside = elements < num_heads * head_dim
    head = elements // head_dim
    dim = elements % head_dim
    first_key = key.data + token * key.token_stride + head * key.head_stride
    keys = tl.load(first_key + dim, mask=inside)
    values = tl.load(value.data + token * value.token_stride + head * value.head_stride + dim, mask=inside)
    if turning is not None:
        angles = token * head_dim + dim
        swapped = tl.load(first_key + (dim + head_dim // 2) % head_dim, mask=inside).to(tl.float32)
        turned = keys.to(tl.float32) * tl.load(turning.cos + angles, mask=inside)
        turned += swapped * tl.load(turning.signed_sin + angles, mask=inside)
        keys = turned.to(keys.dtype)
    keys = to_cached(keys, key_scale, key_cache)
    values = to_cached(values, value_scale, value_cache)
    tl.store(key_cache + slot * (num_heads * head_dim) + elements, keys, mask=inside)
    tl.store(value_cache + slot * (num_heads * head_dim) + elements, values, mask=inside)
    offset = token * (num_heads * head_dim)
    if key_copy is not None:
        tl.store(key_copy + offset + elements, keys.to(key_copy.dtype.element_ty), mask=inside)
    if value_copy is not None:
        tl.store(value_copy + offset + elements, values.to(value_copy.dtype.element_ty), mask=inside)


def write_kv_triton(
    spec: AttentionSpec,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    slot_mapping: torch.Tensor,
    turning: Turning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store each token's key and value, divided by the layer's scales, at its slot.

    Args:
        spec: heads and scales.
        key, value: [T, G, D], any strides but 1 along D.
        cache: two tensors [N, B, G, D], contiguous, of any float type or float8_e4m3fn; changed in place.
        slot_mapping: [T] int64.
        turning: keys are turned by these angles first; None: they are as they should be.

    Returns:
        The keys and values as a later step will read them, but for the scales: what was turned and rounded to the
        cache's type and is back in the type of computation, [T, G, D] each. `key` and `value` themselves if nothing
        was done to them.
    """
    num_tokens, num_heads, head_dim = key.shape
    key_cache, value_cache = cache
    rounds = key_cache.dtype != key.dtype or spec.key_scale != 1.0 or spec.value_scale != 1.0
    key_copy = value_copy = None
    if rounds:
        copies = key.new_empty(2, *key.shape, dtype=operand_type(key.dtype, key_cache.dtype))
        key_copy, value_copy = copies.unbind(0)
    elif turning is not None:
        key_copy = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    if num_tokens:
        _write_kernel[(num_tokens,)](
            strided(key),
            strided(value),
            turning,
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
        )
    return key if key_copy is None else key_copy, value if value_copy is None else value_copy


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slot_mapping"])
def _write_float8_kernel(
    key: StridedHeads,
    value: StridedHeads,
    turning: Turning | None,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    slot_mapping: tl.tensor,
    key_copy: tl.tensor,  # [T, G, D]
    value_copy: tl.tensor,  # [G, D, T up to the next multiple of 16]
    key_scale: float,
    value_scale: float,
    num_tokens: int,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_t: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """One program a head of `block_t` tokens, keys and values."""
    head = tl.program_id(0) % num_heads
    tokens = (tl.program_id(0) // num_heads * block_t + tl.arange(0, block_t)).to(tl.int64)
    inside = tokens < num_tokens
    slots = tl.load(slot_mapping + tokens, mask=inside, other=0)
    places = (slots * num_heads + head) * head_dim
    copies = (tokens * num_heads + head) * head_dim
    half: tl.constexpr = head_dim // 2
    pairs = tl.arange(0, block_d // 2)[None, :]
    is_pair = inside[:, None] & (pairs < half)
    first, second = turned_halves(
        key, turning, tokens * key.token_stride + head * key.head_stride, tokens, inside, head_dim, block_d
    )  # fmt: skip
    first, second = to_cached(first, key_scale, key_cache), to_cached(second, key_scale, key_cache)
    tl.store(key_cache + places[:, None] + pairs, first, mask=is_pair)
    tl.store(key_cache + places[:, None] + half + pairs, second, mask=is_pair)
    tl.store(key_copy + copies[:, None] + pairs, first, mask=is_pair)
    tl.store(key_copy + copies[:, None] + half + pairs, second, mask=is_pair)
    rows = tokens * value.token_stride + head * value.head_stride
    values = to_cached(load_tile(value.data, rows, inside, head_dim, block_d, True), value_scale, value_cache)
    dims = tl.arange(0, block_d)
    is_element = inside[:, None] & (dims < head_dim)[None, :]
    tl.store(value_cache + places[:, None] + dims[None, :], values, mask=is_element)
    padded_tokens = tl.cdiv(num_tokens, 16).to(tl.int64) * 16  # a multiple to the compiler: it stores 16 at a time
    along = value_copy + (head * head_dim + dims)[:, None] * padded_tokens + tokens[None, :]
    tl.store(along, tl.trans(values), mask=(dims < head_dim)[:, None] & (tokens < padded_tokens)[None, :])


def write_float8_kv(
    spec: AttentionSpec,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    slot_mapping: torch.Tensor,
    turning: Turning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`write_kv_triton` to a float8 cache, of which float8 products shall be made.

    Returns:
        The keys and values of the cache in float8, [T, G, D] each; values are contiguous along the tokens, as the
        matrix units want them.
    """
    num_tokens, num_heads, head_dim = key.shape
    key_copy = torch.empty(key.shape, dtype=cache[0].dtype, device=key.device)
    padded_tokens = -(-num_tokens // 16) * 16  # the bulk copy engine's rows begin at multiples of 16 bytes
    along_tokens = torch.empty(num_heads, head_dim, padded_tokens, dtype=cache[0].dtype, device=key.device)
    if num_tokens:
        _write_float8_kernel[(triton.cdiv(num_tokens, BLOCK_TOKENS) * num_heads,)](
            *(strided(key), strided(value), turning, *cache, slot_mapping, key_copy, along_tokens),
            *(spec.key_scale, spec.value_scale, num_tokens),
            num_heads=num_heads,
            head_dim=head_dim,
            block_t=BLOCK_TOKENS,
            block_d=max(16, triton.next_power_of_2(head_dim)),
        )
    return key_copy, along_tokens.permute(2, 0, 1)[:num_tokens]
