"""What the Triton attention kernels share: how tensors are passed to them, scores, the online softmax, cache addresses.

All scores inside the kernels are in base 2 (multiplied by log2(e)), because the GPU has an instruction for 2**x.
Called by `triton_decode.py` and `triton_prefill.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tokenmill.attention.base import AttentionSpec, LayerCache
from tokenmill.ops.triton.launch import is_interpreted

LOG2_E = math.log2(math.e)
IS_INTERPRETED = tl.constexpr(is_interpreted())  # decided when kernels are defined, on import, like this


class StridedHeads(NamedTuple):
    """A tensor [T, heads, D] with unit stride along D, such as a view into the fused projection of q, k and v."""

    data: torch.Tensor
    token_stride: int
    head_stride: int


class Turning(NamedTuple):
    """Angles of T tokens, [T, D] float32 each, contiguous: see `ops.rope.apply_rope`."""

    cos: torch.Tensor
    signed_sin: torch.Tensor


class PagedCache(NamedTuple):
    """One layer's keys and values [N, B, G, D], contiguous."""

    key_data: torch.Tensor
    value_data: torch.Tensor


class Result(NamedTuple):
    """Where the results go and what the last step of attention needs.

    Args:
        output: [T, H, D], contiguous.
        log_sum_exp: [T, H] float32, of the scores, sinks not counted; None: not wanted.
        sinks: [H], a learned score per head that takes probability and has no value; None: no sinks.
    """

    output: Any  # a tensor; inside a kernel a pointer
    log_sum_exp: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


class HeadNorms(NamedTuple):
    """Norms of query and key heads, before they are turned: factors [D] and what is added to the mean square."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


class Scoring(NamedTuple):
    """How a product of query and key becomes a score in base 2, and what a cached number stands for.

    Args:
        factor: on the product. With a soft cap it is also divided by half the cap: see `scores_base2`.
        key_scale: a cached key times this is the key; contained in `factor` already.
        value_scale: likewise for values.
    """

    factor: float
    key_scale: float
    value_scale: float


def strided(heads: torch.Tensor) -> StridedHeads:
    """A tensor [T, heads, D] as a kernel argument."""
    assert heads.stride(-1) == 1, "heads must be contiguous along the head dimension"
    assert heads.shape[0] * heads.stride(0) < 2**31, "offsets inside a step's tokens are 32 bits"
    return StridedHeads(heads, heads.stride(0), heads.stride(1))


def paged(cache: LayerCache) -> PagedCache:
    """A layer's cache as a kernel argument."""
    assert cache[0].is_contiguous() and cache[1].is_contiguous(), "the cache must be contiguous"
    return PagedCache(*cache)


def scoring(spec: AttentionSpec) -> Scoring:
    """A layer's scores as a kernel argument."""
    assert spec.scale > 0, "the kernels take the maximum before they scale"
    factor = spec.scale * spec.key_scale
    factor = factor * LOG2_E if spec.soft_cap is None else 2 * LOG2_E * factor / spec.soft_cap
    return Scoring(factor, spec.key_scale, spec.value_scale)


def soft_cap_base2(spec: AttentionSpec) -> float:
    """The soft cap in base 2, 0 for none: a constant of the compiled kernel."""
    return 0.0 if spec.soft_cap is None else spec.soft_cap * LOG2_E


def operand_type(query: torch.dtype, cache: torch.dtype) -> torch.dtype:
    """The type in which queries, keys, probabilities and values are multiplied; sums are always float32.

    float16 holds every float8 number exactly and is one conversion away from it, unlike bfloat16. The interpreter
    (`TRITON_INTERPRET=1`) computes with NumPy, which has no bfloat16.
    """
    if query == torch.float32:
        return torch.float32
    if cache.itemsize == 1:
        return torch.float16
    if query == torch.bfloat16 and triton.knobs.runtime.interpret:
        return torch.float32
    return query


def triton_type(dtype: torch.dtype) -> Any:
    """The Triton name of a torch type."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


@triton.jit
def scores_base2(products: tl.tensor, factor: tl.tensor, cap: tl.constexpr) -> tl.tensor:
    """Scores in base 2. With a cap: cap * tanh(x), written with 2**(2x * log2(e)), which `factor` is made for."""
    scores = products * factor
    if cap > 0:
        scores = cap - 2 * cap / (tl.exp2(scores) + 1)
    return scores


@triton.jit
def softmax_step(
    products: tl.tensor,  # [..., M, N] of queries and keys
    visible: tl.tensor,  # of a shape that broadcasts to it, unused unless masked
    maximum: tl.tensor,  # [..., M] so far, in base 2
    total: tl.tensor,  # [..., M] so far
    factor: tl.tensor,
    cap: tl.constexpr,
    masked: tl.constexpr,
    may_be_first: tl.constexpr = True,
    factor_per_query: tl.constexpr = False,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """One step of the online softmax: probabilities, factor on what was summed before, new maximum, new total.

    A query that has seen no key yet has the maximum -inf and the total 0; unless it `may_be_first`, there is none.
    """
    element_factor = factor
    if factor_per_query:
        element_factor = tl.expand_dims(factor, -1)
    if cap > 0:
        scores = scores_base2(products, element_factor, cap)
        if masked:
            scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, -1))
        reference = new_maximum
        if masked and may_be_first:
            reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        probabilities = tl.exp2(scores - tl.expand_dims(reference, -1))
    else:  # scaling after the maximum makes scale and subtraction one instruction
        if masked:
            products = tl.where(visible, products, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(products, -1) * factor)
        reference = new_maximum
        if masked and may_be_first:
            reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        probabilities = tl.exp2(products * element_factor - tl.expand_dims(reference, -1))
    decay = tl.exp2(maximum - reference)
    return probabilities, decay, new_maximum, total * decay + tl.sum(probabilities, -1)


@triton.jit
def end_softmax(
    values: tl.tensor,  # [M, block_d], not divided by the totals
    maximum: tl.tensor,  # [M] base 2
    total: tl.tensor,  # [M]
    places: tl.tensor,  # [M] token * H + head
    heads: tl.tensor,  # [M]
    is_result: tl.tensor,  # [M]
    result: Result,
    value_scale: tl.tensor,
) -> tl.tensor:
    """The results [M, block_d] where `is_result`, rounded; other lanes may have seen no key. Stores `log_sum_exp`."""
    total = tl.where(is_result, total, 1.0)
    if result.log_sum_exp is not None:
        tl.store(result.log_sum_exp + places, (maximum + tl.log2(total)) * 0.6931471805599453, mask=is_result)
    if result.sinks is not None:
        sink = tl.load(result.sinks + heads, mask=is_result, other=0.0).to(tl.float32) * 1.4426950408889634
        with_sink = tl.maximum(maximum, sink)
        decay = tl.exp2(maximum - with_sink)
        total = total * decay + tl.exp2(sink - with_sink)
        values = values * decay[:, None]
    return (values * (value_scale / total)[:, None]).to(result.output.dtype.element_ty)


@triton.jit
def store_result(
    values: tl.tensor,  # [M, block_d], not divided by the totals
    maximum: tl.tensor,  # [M] base 2
    total: tl.tensor,  # [M]
    places: tl.tensor,  # [M] token * H + head
    heads: tl.tensor,  # [M]
    is_result: tl.tensor,  # [M]
    result: Result,
    value_scale: tl.tensor,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """End the softmax and store where `is_result`; other lanes may have seen no key."""
    ended = end_softmax(values, maximum, total, places, heads, is_result, result, value_scale)
    dims = tl.arange(0, block_d)
    pointers = result.output + places[:, None] * head_dim + dims[None, :]
    is_element = is_result[:, None] & (dims < head_dim)[None, :]
    tl.store(pointers, ended, mask=is_element)


@triton.jit
def load_blocks(
    table: tl.tensor,  # pointer to the row's block table
    tile: tl.tensor,  # a multiple of block_n
    first: tl.tensor,
    end: tl.tensor,
    tokens_per_block: tl.constexpr,
    block_n: tl.constexpr,
) -> tl.tensor:
    """Cache blocks of the positions from `tile` on, [block_n] or, if the tile lies in one block, a scalar.

    Of the table only the entries of positions `first` to `end` are read. Kernels load the blocks of a tile one step of
    the loop before its keys, as a loop-carried value that is nothing but this load: only so does the compiler keep
    several tiles under way.
    """
    if tokens_per_block % block_n == 0:
        blocks = tl.load(table + tl.minimum(tile, end - 1) // tokens_per_block)
    else:
        positions = tile + tl.arange(0, block_n)
        inside = (positions >= first) & (positions < end)
        blocks = tl.load(table + positions // tokens_per_block, mask=inside, other=0)
    return blocks


@triton.jit
def cache_slots(blocks: tl.tensor, positions: tl.tensor, tokens_per_block: tl.constexpr) -> tl.tensor:
    """[N] int64, slots of the positions whose blocks are given."""
    return blocks.to(tl.int64) * tokens_per_block + positions % tokens_per_block


@triton.jit
def load_tile(
    data: tl.tensor,  # pointer to the head's first number
    rows: tl.tensor,  # [N] offset of each token
    inside: tl.tensor,  # [N], unused unless masked
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    masked: tl.constexpr,
) -> tl.tensor:
    """[N, block_d]; zero where not `inside` and beyond `head_dim`: what is not the row's own is never read."""
    dims = tl.arange(0, block_d)
    pointers = data + rows[:, None] + dims[None, :]
    if masked:
        if head_dim == block_d:
            tile = tl.load(pointers, mask=inside[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=inside[:, None] & (dims < head_dim)[None, :], other=0.0)
    elif head_dim == block_d:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(dims < head_dim)[None, :], other=0.0)
    return tile


@triton.jit
def load_exchanged(
    data: tl.tensor,  # pointer to the head's first number
    rows: tl.tensor,  # [N] offset of each row
    inside: tl.tensor,  # [N]
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
) -> tl.tensor:
    """`load_tile`, masked, of heads with their halves exchanged."""
    dims = tl.arange(0, block_d)
    partners = (dims + head_dim // 2) % head_dim
    is_element = inside[:, None] & (dims < head_dim)[None, :]
    return tl.load(data + rows[:, None] + partners[None, :], mask=is_element, other=0.0)


@triton.jit
def load_angles(
    turning: Turning, token: tl.tensor, head_dim: tl.constexpr, block_d: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Cosines and signed sines of a token, [block_d] each."""
    dims = tl.arange(0, block_d)
    angles = token * head_dim + dims
    cosines = tl.load(turning.cos + angles, mask=dims < head_dim, other=0.0)
    return cosines, tl.load(turning.signed_sin + angles, mask=dims < head_dim, other=0.0)


@triton.jit
def turn(
    tile: tl.tensor,  # [N, block_d]
    exchanged: tl.tensor,  # its halves exchanged
    cosines: tl.tensor,  # [block_d]
    sines: tl.tensor,
) -> tl.tensor:
    """The tile turned by the angles and rounded as between two ops."""
    turned = tile.to(tl.float32) * cosines[None, :] + exchanged.to(tl.float32) * sines[None, :]
    return turned.to(tile.dtype)


@triton.jit
def turned_halves(
    heads: StridedHeads,
    turning: Turning | None,
    rows: tl.tensor,  # [block_m] offset of each query
    tokens: tl.tensor,  # [block_m]
    is_query: tl.tensor,  # [block_m]
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of heads, [block_m, block_d / 2] each, turned and rounded as between two ops; zero where none is."""
    half: tl.constexpr = head_dim // 2
    pairs = tl.arange(0, block_d // 2)[None, :]
    is_pair = is_query[:, None] & (pairs < half)
    first = heads.data + rows[:, None] + pairs
    x1 = tl.load(first, mask=is_pair, other=0.0)
    x2 = tl.load(first + half, mask=is_pair, other=0.0)
    if turning is not None:
        angles = tokens[:, None] * head_dim + pairs
        cosines = tl.load(turning.cos + angles, mask=is_pair, other=0.0)
        sines = tl.load(turning.signed_sin + half + angles, mask=is_pair, other=0.0)
        rounded: tl.constexpr = heads.data.dtype.element_ty  # type: ignore[attr-defined]
        y1, y2 = x1.to(tl.float32), x2.to(tl.float32)
        x1, x2 = (y1 * cosines - y2 * sines).to(rounded), (y2 * cosines + y1 * sines).to(rounded)
    return x1, x2


@triton.jit
def load_turned(
    data: tl.tensor,  # pointer to the head's first number
    rows: tl.tensor,  # [N] offset of each row
    inside: tl.tensor,  # [N]
    turning: Turning | None,
    token: tl.tensor,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
) -> tl.tensor:
    """`load_tile`, masked, of heads of one token, turned by its angles."""
    tile = load_tile(data, rows, inside, head_dim, block_d, True)
    if turning is not None:
        exchanged = load_exchanged(data, rows, inside, head_dim, block_d)
        cosines, sines = load_angles(turning, token, head_dim, block_d)
        tile = turn(tile, exchanged, cosines, sines)
    return tile


@triton.jit
def to_float8(numbers: tl.tensor) -> tl.tensor:
    """float32 as float8, rounded to the nearest: the interpreter by itself would cut digits off."""
    if IS_INTERPRETED:
        bits = numbers.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF  # three digits behind the first
        small = (numbers + 24576.0) - 24576.0  # multiples of 2**-9
        numbers = tl.where(tl.abs(numbers) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return numbers.to(tl.float8e4nv)


@triton.jit
def to_cached(numbers: tl.tensor, scale: tl.tensor, like: tl.tensor) -> tl.tensor:
    """Numbers divided by the scale, in the type that pointer `like` points to; float8 saturates, NaN stays NaN."""
    numbers = numbers.to(tl.float32) / scale
    if like.dtype.element_ty == tl.float8e4nv:
        numbers = tl.where(numbers > 448.0, 448.0, tl.where(numbers < -448.0, -448.0, numbers))
    return numbers.to(like.dtype.element_ty)
