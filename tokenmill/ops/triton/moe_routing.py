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

from tokenmill.ops.fp8 import FP8_DTYPE
from tokenmill.ops.moe_plan import max_row_blocks
from tokenmill.ops.triton.fp8 import FP8_MAX, INVERSE_FP8_MAX, MIN_SCALE
from tokenmill.ops.triton.launch import as_rows, can_overlap, warps_for
from tokenmill.ops.triton.moe_scales import prefetch_rows

SORT_BLOCKS = (256, 2048, 4096)
"""Pairs that a sorting program looks at together; few values, since each is compiled once."""
ENTRIES_PER_STORE = tl.constexpr(128)
COLUMNS_PER_STEP = tl.constexpr(1024)
"""Of a row that is quantized by the warp that routes it."""
AHEAD_BYTES = 16 * 2**20
"""Weights that are asked for while pairs are sorted: a third of the L2 cache, which takes about as long to fill."""
CACHE_LINE = tl.constexpr(128)


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
def _quantize_row(row: tl.tensor, values_out: tl.tensor, scale_out: tl.tensor, size: tl.tensor) -> None:
    """A row to float8 with one scale, as `triton.fp8.quantized` does; read twice, since one warp cannot hold it."""
    columns = tl.arange(0, COLUMNS_PER_STEP)
    largest = tl.zeros([COLUMNS_PER_STEP], tl.float32)
    for start in range(0, size, COLUMNS_PER_STEP):
        values = tl.load(row + start + columns, mask=columns < size - start, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    scale = tl.maximum(tl.max(largest, axis=0) * INVERSE_FP8_MAX, MIN_SCALE)
    factor = tl.div_rn(1.0, scale)
    for start in range(0, size, COLUMNS_PER_STEP):
        values = tl.load(row + start + columns, mask=columns < size - start, other=0.0).to(tl.float32)
        scaled = tl.clamp(values * factor, -FP8_MAX, FP8_MAX).to(tl.float8e4nv)
        tl.store(values_out + start + columns, scaled, mask=columns < size - start)
    tl.store(scale_out, scale)


@triton.jit
def _route_kernel(
    logits: tl.tensor,
    experts_out: tl.tensor,
    weights_out: tl.tensor,
    num_experts: int,
    row_stride: int,
    x: tl.tensor,
    x_stride: int,
    size: int,
    values_out: tl.tensor,
    scales_out: tl.tensor,
    top_k: tl.constexpr,
    normalize: tl.constexpr,
    block_experts: tl.constexpr,
    block_k: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One token; its row of x is quantized on the way, if x is given."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    if x is not None:
        _quantize_row(x + token * x_stride, values_out + token * size, scales_out + token, size)
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
    ahead: tl.tensor,
    block_rows: tl.constexpr,
    block: tl.constexpr,
    lines_ahead: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program an expert, which knows where its tiles begin from how many pairs go to experts before it."""
    expert = tl.program_id(0)
    if overlaps:
        gdc_launch_dependents()
        if lines_ahead > 0:
            line = CACHE_LINE // (ahead.dtype.element_ty.primitive_bitwidth // 8)
            rows = ahead + (expert.to(tl.int64) * lines_ahead + tl.arange(0, lines_ahead)) * line
            prefetch_rows(rows, line, 1)
        gdc_wait()
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
    return _launch_route(logits, top_k, normalize, None, None, None)


def route_and_quantize(
    logits: torch.Tensor, top_k: int, normalize: bool, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route`, and values [T, H] float8_e4m3fn and scales [T] float32 of x [T, H], in one launch."""
    rows = as_rows(x)
    values = torch.empty(rows.shape, dtype=FP8_DTYPE, device=x.device)
    scales = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    return *_launch_route(logits, top_k, normalize, rows, values, scales), values, scales


def _launch_route(
    logits: torch.Tensor,
    top_k: int,
    normalize: bool,
    x: torch.Tensor | None,
    values: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
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
            x,
            0 if x is None else x.stride(0),
            0 if x is None else x.shape[1],
            values,
            scales,
            top_k=top_k,
            normalize=normalize,
            block_experts=triton.next_power_of_2(num_experts),
            block_k=triton.next_power_of_2(top_k),
            overlaps=overlaps,
            num_warps=1,
            launch_pdl=overlaps,
        )
    return experts, weights


def sort_pairs(
    experts: torch.Tensor, first_expert: int, num_experts: int, block_rows: int, ahead: torch.Tensor | None = None
) -> RowBlocks:
    """The pairs of experts [T, K] in tiles of `block_rows`; those of experts beyond this rank's are left out.

    Meanwhile the first weights of `ahead`, which the next kernel will read, come to the cache.
    """
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
        ahead,
        block_rows=block_rows,
        block=block,
        lines_ahead=0 if ahead is None else _lines_ahead(ahead, num_experts),
        overlaps=overlaps,
        num_warps=min(8, block // 256),
        launch_pdl=overlaps,
    )
    return RowBlocks(pairs, tile_experts, block_rows)


def _lines_ahead(weights: torch.Tensor, num_programs: int) -> int:
    """Cache lines that each program asks for, a power of two; together no more than there are."""
    num_bytes = min(AHEAD_BYTES, weights.numel() * weights.element_size())
    num_lines = num_bytes // (int(CACHE_LINE.value) * num_programs)
    return 1 << (num_lines.bit_length() - 1) if num_lines else 0


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
