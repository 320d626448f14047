"""Routing on the device: the experts of each token, pairs of token and expert sorted into tiles of one expert each, and
the sum of each token's experts. Nothing of it is known to the host, so a step with it can be captured in a CUDA graph.

A pair is a token and one of its experts: pair `t * K + k`. Called by `ops.moe` and `moe_tiles.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.moe_plan import max_row_blocks
from tokenmill.ops.triton.launch import can_overlap, warps_for

SORT_BLOCKS = (256, 2048, 4096)
"""Pairs that a sorting program looks at together; few values, since each is compiled once."""
ENTRIES_PER_STORE = tl.constexpr(128)


class RowBlocks(NamedTuple):
    """Pairs sorted by expert, each expert's in whole tiles of R rows; there are more tiles than needed, here and there.

    Args:
        pairs: [tiles * R] int32; the number of all pairs where a tile is not full.
        experts: [tiles] int32, each tile's expert; -1 for tiles that are not needed.
        block_rows: R.
    """

    pairs: torch.Tensor
    experts: torch.Tensor
    block_rows: int


@triton.jit
def _route_kernel(
    logits: tl.tensor,
    experts_out: tl.tensor,
    weights_out: tl.tensor,
    num_experts: int,
    row_stride: int,
    top_k: tl.constexpr,
    normalize: tl.constexpr,
    block_experts: tl.constexpr,
    block_k: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One token."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block_experts)
    inside = columns < num_experts
    values = tl.load(logits + token * row_stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    values = tl.exp(values - tl.max(values, axis=0))
    values = tl.where(inside, values / tl.sum(values, axis=0), -1.0)
    ranks = tl.arange(0, block_k)
    experts = tl.zeros([block_k], tl.int32)
    weights = tl.zeros([block_k], tl.float32)
    for k in tl.static_range(top_k):
        best = tl.argmax(values, axis=0)
        experts = tl.where(ranks == k, tl.minimum(best, num_experts - 1), experts)
        weights = tl.where(ranks == k, tl.max(values, axis=0), weights)
        values = tl.where(columns == best, -1.0, values)
    if normalize:
        weights = weights / tl.sum(weights, axis=0)
    tl.store(experts_out + token * top_k + ranks, experts, mask=ranks < top_k)
    tl.store(weights_out + token * top_k + ranks, weights, mask=ranks < top_k)


@triton.jit
def _load_local(
    experts: tl.tensor,
    start: tl.tensor,
    num_pairs: tl.tensor,
    first: tl.tensor,
    num_experts: tl.tensor,
    block: tl.constexpr,
) -> tl.tensor:
    """The local experts of some pairs; `num_experts` for pairs of other ranks and past the end."""
    pairs = start + tl.arange(0, block)
    local = tl.load(experts + pairs, mask=pairs < num_pairs, other=-1) - first
    return tl.where((pairs < num_pairs) & (local >= 0) & (local < num_experts), local, num_experts)


@triton.jit
def _fill(out: tl.tensor, first: tl.tensor, last: tl.tensor, value: tl.tensor) -> None:
    for start in range(first, last, ENTRIES_PER_STORE):
        places = start + tl.arange(0, ENTRIES_PER_STORE)
        tl.store(out + places, tl.zeros([ENTRIES_PER_STORE], tl.int32) + value, mask=places < last)


@triton.jit(do_not_specialize=["num_pairs", "first_expert", "num_tiles"])
def _sort_kernel(
    experts: tl.tensor,
    pairs_out: tl.tensor,
    tile_experts: tl.tensor,
    num_pairs: int,
    first_expert: int,
    num_experts: int,
    num_tiles: int,
    block_rows: tl.constexpr,
    block: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program an expert, which knows where its tiles begin from how many pairs go to experts before it."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.program_id(0)
    before = tl.zeros([block], tl.int32)
    own = tl.zeros([block], tl.int32)
    for start in range(0, num_pairs, block):
        local = _load_local(experts, start, num_pairs, first_expert, num_experts, block)
        before += (local < expert).to(tl.int32)
        own += (local == expert).to(tl.int32)
    num_before, num_own = tl.sum(before, axis=0), tl.sum(own, axis=0)
    first_tile = num_before // block_rows + expert
    last_tile = first_tile + (num_own + block_rows - 1) // block_rows
    next_tile = (num_before + num_own) // block_rows + expert + 1
    if expert == num_experts - 1:
        next_tile = num_tiles
    place = first_tile * block_rows
    for start in range(0, num_pairs, block):
        local = _load_local(experts, start, num_pairs, first_expert, num_experts, block)
        is_own = (local == expert).to(tl.int32)
        ranks = tl.cumsum(is_own, axis=0) - 1
        tl.store(pairs_out + place + ranks, start + tl.arange(0, block), mask=is_own == 1)
        place += tl.sum(is_own, axis=0)
    _fill(pairs_out, place, last_tile * block_rows, num_pairs)
    _fill(tile_experts, first_tile, last_tile, expert)
    _fill(tile_experts, last_tile, next_tile, -1)


@triton.jit(do_not_specialize=["first_expert"])
def _combine_kernel(
    of_pairs: tl.tensor,
    experts: tl.tensor,
    out: tl.tensor,
    first_expert: int,
    num_experts: int,
    size: int,
    top_k: tl.constexpr,
    block: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """`block` features of one token."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < size
    total = tl.zeros([block], tl.float32)
    for k in tl.static_range(top_k):
        local = tl.load(experts + token * top_k + k) - first_expert + tl.zeros([block], tl.int32)
        is_here = (local >= 0) & (local < num_experts)
        pair = of_pairs + (token * top_k + k) * size + columns
        total += tl.load(pair, mask=inside & is_here, other=0.0).to(tl.float32)
    tl.store(out + token * size + columns, total.to(out.dtype.element_ty), mask=inside)


def route(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts [T, K] int32 and their weights [T, K] float32 from logits [T, E]."""
    num_tokens, num_experts = logits.shape
    experts = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    if num_tokens:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        overlaps = can_overlap(logits.device)
        _route_kernel[(num_tokens,)](
            logits,
            experts,
            weights,
            num_experts,
            logits.stride(0),
            top_k=top_k,
            normalize=normalize,
            block_experts=triton.next_power_of_2(num_experts),
            block_k=triton.next_power_of_2(top_k),
            overlaps=overlaps,
            num_warps=1,
            launch_pdl=overlaps,
        )
    return experts, weights


def sort_pairs(experts: torch.Tensor, first_expert: int, num_experts: int, block_rows: int) -> RowBlocks:
    """The pairs of experts [T, K] in tiles of `block_rows`; those of experts beyond this rank's are left out."""
    num_pairs = experts.numel()
    num_tiles = max_row_blocks(num_pairs, num_experts, block_rows)
    pairs = torch.empty(num_tiles * block_rows, dtype=torch.int32, device=experts.device)
    tile_experts = torch.empty(num_tiles, dtype=torch.int32, device=experts.device)
    block = next((size for size in SORT_BLOCKS if num_pairs <= size), SORT_BLOCKS[-1])
    overlaps = can_overlap(experts.device)
    _sort_kernel[(num_experts,)](
        experts,
        pairs,
        tile_experts,
        num_pairs,
        first_expert,
        num_experts,
        num_tiles,
        block_rows=block_rows,
        block=block,
        overlaps=overlaps,
        num_warps=min(8, block // 256),
        launch_pdl=overlaps,
    )
    return RowBlocks(pairs, tile_experts, block_rows)


def combine(of_pairs: torch.Tensor, experts: torch.Tensor, first_expert: int, num_experts: int) -> torch.Tensor:
    """Sums [T, H] over pairs [T * K, H], weighted already, in the order of `experts`; other ranks' are not read."""
    num_tokens, top_k = experts.shape
    size = of_pairs.shape[1]
    out = torch.empty(num_tokens, size, dtype=of_pairs.dtype, device=of_pairs.device)
    block = min(1024, triton.next_power_of_2(size))
    overlaps = can_overlap(of_pairs.device)
    _combine_kernel[(num_tokens, triton.cdiv(size, block))](
        of_pairs,
        experts,
        out,
        first_expert,
        num_experts,
        size,
        top_k=top_k,
        block=block,
        overlaps=overlaps,
        num_warps=warps_for(block * 2),
        launch_pdl=overlaps,
    )
    return out
