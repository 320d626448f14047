"""Pairs of token and expert sorted into tiles of rows of one expert each, on the device.

A pair is a token and one of its experts: pair `t * K + k`. Few pairs are sorted in one launch, by a program for each
expert that looks at all of them. Of many, a program has a part of the pairs and a few experts: the first of two
launches counts, the second adds up what the parts before have. Called by `moe_layer.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.moe_plan import max_row_blocks
from tokenmill.ops.triton.launch import can_overlap

MAX_TOGETHER = 8192
"""Pairs up to which one launch is faster than two."""
PARTS = 16
PART_BLOCK = 1024
EXPERTS_TOGETHER = 8
"""Of many pairs a program has one part, looks at so many of them at a time, and finds those of so many experts."""
SORT_BLOCKS = (256, 2048, 4096)
"""Pairs that a sorting program looks at together; few values, since each is compiled once."""
ENTRIES_PER_STORE = tl.constexpr(128)


class RowBlocks(NamedTuple):
    """Pairs sorted by expert, each expert's in whole tiles of R rows; there are more tiles than needed, here and there.

    Args:
        pairs: [tiles * R] int32; the number of all pairs where a tile is not full.
        experts: [tiles] int32, each tile's expert; -1 for tiles that are not needed.
        block_rows: R.
        num_used: [1] int32, the number of tiles that are needed, if these come first and follow each other.
    """

    pairs: torch.Tensor
    experts: torch.Tensor
    block_rows: int
    num_used: torch.Tensor | None = None


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
    """Store `value` at all places from `first` to before `last`."""
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


@triton.jit(do_not_specialize=["num_pairs", "first_expert", "part_pairs"])
def _count_kernel(
    experts: tl.tensor,
    counts: tl.tensor,  # [parts, num_experts]
    num_pairs: int,
    first_expert: int,
    num_experts: int,
    part_pairs: int,
    group: tl.constexpr,
    block: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """How many pairs of one part go to each of `group` experts."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    own = tl.program_id(0) * group + tl.arange(0, group)
    first = tl.program_id(1) * part_pairs
    total = tl.zeros([group], tl.int32)
    for start in range(first, tl.minimum(first + part_pairs, num_pairs), block):
        local = _load_local(experts, start, num_pairs, first_expert, num_experts, block)
        total += tl.sum((local[None, :] == own[:, None]).to(tl.int32), axis=1)
    tl.store(counts + tl.program_id(1) * num_experts + own, total, mask=own < num_experts)


@triton.jit(do_not_specialize=["num_pairs", "first_expert", "part_pairs", "num_tiles"])
def _place_kernel(
    experts: tl.tensor,
    counts: tl.tensor,
    pairs_out: tl.tensor,
    tile_experts: tl.tensor,
    num_used: tl.tensor,
    num_pairs: int,
    first_expert: int,
    num_experts: int,
    part_pairs: int,
    num_tiles: int,
    block_rows: tl.constexpr,
    parts: tl.constexpr,
    block_experts: tl.constexpr,
    group: tl.constexpr,
    block: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """Put one part's pairs of `group` experts where they belong, and fill up the tiles of some of the experts."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    part = tl.program_id(1)
    all_experts = tl.arange(0, block_experts)
    rows = tl.arange(0, parts)[:, None]
    places = counts + rows * num_experts + all_experts[None, :]
    of_parts = tl.load(places, mask=(all_experts < num_experts)[None, :], other=0)
    totals = tl.sum(of_parts, axis=0)
    earlier = tl.sum(tl.where(rows < part, of_parts, 0), axis=0)
    tiles = (totals + block_rows - 1) // block_rows
    own = tl.program_id(0) * group + tl.arange(0, group)
    first_tiles = tl.sum(tl.where(all_experts[None, :] < own[:, None], tiles[None, :], 0), axis=1)
    is_own = all_experts[None, :] == own[:, None]
    place = first_tiles * block_rows + tl.sum(tl.where(is_own, earlier[None, :], 0), axis=1)
    first = part * part_pairs
    for start in range(first, tl.minimum(first + part_pairs, num_pairs), block):
        local = _load_local(experts, start, num_pairs, first_expert, num_experts, block)
        is_here = ((local[None, :] == own[:, None]) & (own < num_experts)[:, None]).to(tl.int32)
        ranks = tl.cumsum(is_here, axis=1) - 1
        pairs = start + tl.arange(0, block)[None, :] + tl.zeros([group, block], tl.int32)
        tl.store(pairs_out + place[:, None] + ranks, pairs, mask=is_here == 1)
        place += tl.sum(is_here, axis=1)
    for index in range(part, group, parts):
        expert = tl.program_id(0) * group + index
        first_tile = tl.sum(tl.where(all_experts < expert, tiles, 0), axis=0)
        last_tile = first_tile + tl.sum(tl.where(all_experts == expert, tiles, 0), axis=0)
        last_place = first_tile * block_rows + tl.sum(tl.where(all_experts == expert, totals, 0), axis=0)
        _fill(pairs_out, last_place, last_tile * block_rows, num_pairs)
        _fill(tile_experts, first_tile, last_tile, expert)
    if (part == parts - 1) & (tl.program_id(0) == 0):
        num_all = tl.sum(tiles, axis=0)
        _fill(tile_experts, num_all, num_tiles, -1)
        tl.store(num_used, num_all)


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


def sort_many_pairs(experts: torch.Tensor, first_expert: int, num_experts: int, block_rows: int) -> RowBlocks:
    """As `sort_pairs`, with tiles that follow each other without a gap, and how many they are."""
    num_pairs, device = experts.numel(), experts.device
    num_tiles = max_row_blocks(num_pairs, num_experts, block_rows)
    part_pairs = triton.cdiv(triton.cdiv(num_pairs, PARTS), PART_BLOCK) * PART_BLOCK
    counts = torch.empty(PARTS, num_experts, dtype=torch.int32, device=device)
    pairs = torch.empty(num_tiles * block_rows, dtype=torch.int32, device=device)
    tile_experts = torch.empty(num_tiles, dtype=torch.int32, device=device)
    num_used = torch.empty(1, dtype=torch.int32, device=device)
    overlaps = can_overlap(device)
    grid = (triton.cdiv(num_experts, EXPERTS_TOGETHER), PARTS)
    _count_kernel[grid](
        experts,
        counts,
        num_pairs,
        first_expert,
        num_experts,
        part_pairs,
        group=EXPERTS_TOGETHER,
        block=PART_BLOCK,
        overlaps=overlaps,
        num_warps=4,
        launch_pdl=overlaps,
    )
    _place_kernel[grid](
        experts,
        counts,
        pairs,
        tile_experts,
        num_used,
        num_pairs,
        first_expert,
        num_experts,
        part_pairs,
        num_tiles,
        block_rows=block_rows,
        parts=PARTS,
        block_experts=triton.next_power_of_2(num_experts),
        group=EXPERTS_TOGETHER,
        block=PART_BLOCK,
        overlaps=overlaps,
        num_warps=4,
        launch_pdl=overlaps,
    )
    return RowBlocks(pairs, tile_experts, block_rows, num_used)
