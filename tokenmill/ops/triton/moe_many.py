"""Products of many tokens with their experts on Hopper, float8 by float8: programs that stay and never pause.

There are as many programs as multiprocessors. Each multiplies 128 rows of one expert with 256 rows of its weights, tile
after tile, and the blocks of the next tile are on their way while it finishes one. A loop that the compiler pipelines
ends with each tile, so this is Gluon, where copies and waits are written out; it has no interpreter. Called by
`moe_layer.py` where arithmetic takes the time and not the weights.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tokenmill.ops.fp8 import QuantizedRows
from tokenmill.ops.moe import ExpertMatrix, ExpertWeights, Routing
from tokenmill.ops.moe_plan import MANY_ROWS, MANY_STAGES
from tokenmill.ops.platform import num_multiprocessors
from tokenmill.ops.triton.moe_sorting import RowBlocks

BLOCK_IN = 128
NUM_WARPS = 8
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # newer versions of triton renamed both
load_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _fetch_rows(
    buffer: gl.shared_memory_descriptor, x: gl.tensor, sources: gl.tensor, exists: gl.tensor, x_stride: gl.tensor,
    columns: gl.tensor, step: gl.tensor, block_in: gl.constexpr,
) -> None:  # fmt: skip
    """Begin to copy a block of rows; zeros for those that do not exist."""
    places = x + (sources.to(gl.int64) * x_stride)[:, None] + (step * block_in + columns)[None, :]
    load_async(buffer, places, mask=exists[:, None])


@gluon.jit
def _fetch_weights(
    buffer: gl.shared_memory_descriptor, weight: gl.tensor, first_row: gl.tensor, in_features: gl.tensor,
    offsets: gl.tensor, step: gl.tensor, block_in: gl.constexpr,
) -> None:  # fmt: skip
    """Begin to copy a block of weights."""
    load_async(buffer, weight + first_row * in_features + step * block_in + offsets)


@gluon.jit
def _multiply(
    v_buffers: gl.shared_memory_descriptor, w_buffers: gl.shared_memory_descriptor, buffer: gl.tensor,
    x: gl.tensor, x_stride: gl.tensor, weight: gl.tensor, in_features: gl.tensor, offsets: gl.tensor,
    columns: gl.tensor, sources: gl.tensor, exists: gl.tensor, first_row: gl.tensor,
    next_sources: gl.tensor, next_exists: gl.tensor, next_row: gl.tensor,
    num_steps: gl.constexpr, num_stages: gl.constexpr, block_rows: gl.constexpr, block_in: gl.constexpr,
    layout: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:  # fmt: skip
    """Sums of a tile's rows with a block of weights, while blocks of the next are fetched; and the next stage.

    The number of steps is known to the compiler: it must see that the sums are those of products in flight.
    """
    ahead: gl.constexpr = num_stages - 1
    total = gl.zeros([block_rows, 2 * block_rows], gl.float32, layout)
    for step in range(num_steps):
        async_copy.wait_group(ahead - 1)
        fence_async_shared()
        values, weights = v_buffers.index(buffer), w_buffers.index(buffer).permute([1, 0])
        total = warpgroup_mma(values, weights, total, is_async=True)
        total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
        barrier()  # all have multiplied the blocks before, whose places are filled now
        target = (buffer + ahead) % num_stages
        is_next = step + ahead >= num_steps
        later = gl.where(is_next, step + ahead - num_steps, step + ahead)
        of_later, is_later = gl.where(is_next, next_sources, sources), gl.where(is_next, next_exists, exists)
        _fetch_rows(v_buffers.index(target), x, of_later, is_later, x_stride, columns, later, block_in)
        row = gl.where(is_next, next_row, first_row)
        _fetch_weights(w_buffers.index(target), weight, row, in_features, offsets, later, block_in)
        async_copy.commit_group()
        buffer = (buffer + 1) % num_stages
    return warpgroup_mma_wait(num_outstanding=0, deps=(total,)), buffer


@gluon.jit
def _store(
    total: gl.tensor, out: gl.tensor, rows: gl.tensor, num_pairs: gl.tensor, out_features: gl.tensor,
    first_feature: gl.tensor, of_rows: gl.tensor, of_left: gl.tensor, of_right: gl.tensor,
    is_gated: gl.constexpr, half: gl.constexpr, layout: gl.constexpr,
) -> None:  # fmt: skip
    """Scale both halves of the sums and store them; gate and up activated and multiplied."""
    left, right = gl.split(gl.permute(gl.reshape(total, [half, 2, half]), [0, 2, 1]))
    by_row = gl.convert_layout(of_rows, gl.SliceLayout(1, left.type.layout))[:, None]
    left *= by_row * gl.convert_layout(of_left, gl.SliceLayout(0, left.type.layout))[None, :]
    right *= by_row * gl.convert_layout(of_right, gl.SliceLayout(0, left.type.layout))[None, :]
    features = first_feature + gl.arange(0, half, gl.SliceLayout(0, layout))
    places = out + rows.to(gl.int64)[:, None] * out_features + features[None, :]
    is_row = (rows < num_pairs)[:, None]
    if is_gated:
        left = left / (1.0 + gl.exp(-left)) * right
    gl.store(places, gl.convert_layout(left.to(out.dtype.element_ty), layout), mask=is_row)
    if not is_gated:
        gl.store(places + half, gl.convert_layout(right.to(out.dtype.element_ty), layout), mask=is_row)


@gluon.jit
def _item(
    item: gl.tensor, num_items: gl.tensor, num_blocks: gl.tensor, block_out: gl.tensor, pairs: gl.tensor,
    tile_experts: gl.tensor, matrix_rows: gl.tensor, num_pairs: gl.tensor,
    top_k: gl.constexpr, block_rows: gl.constexpr, layout: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor, gl.tensor]:  # fmt: skip
    """Of an item, or the last one: tile, first feature, its row of all weights, rows of x, which there are."""
    inside = gl.minimum(item, num_items - 1)
    tile, feature = inside // num_blocks, inside % num_blocks * block_out
    rows = gl.load(pairs + tile * block_rows + gl.arange(0, block_rows, layout))
    exists = rows < num_pairs
    first_row = gl.load(tile_experts + tile).to(gl.int64) * matrix_rows + feature
    return tile, feature, first_row, gl.where(exists, rows // top_k, 0), exists


@gluon.jit
def _factors(
    x_scale: gl.tensor, weight_scale: gl.tensor, shares: gl.tensor, pairs: gl.tensor, first_row: gl.tensor,
    second: gl.tensor, num_pairs: gl.tensor, top_k: gl.constexpr, block_rows: gl.constexpr, layout: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:  # fmt: skip
    """What the sums of a tile's rows, and of both halves of the weights, are multiplied with."""
    places = gl.arange(0, block_rows, layout)
    rows = gl.load(pairs + places)
    source = gl.where(rows < num_pairs, rows // top_k, 0)
    of_rows = gl.load(x_scale + source)
    if shares is not None:
        of_rows *= gl.load(shares + source)
    return of_rows, gl.load(weight_scale + first_row + places), gl.load(weight_scale + first_row + second + places)


@gluon.jit
def _offsets(
    second: gl.tensor, in_features: gl.tensor, block_rows: gl.constexpr, block_in: gl.constexpr, layout: gl.constexpr
) -> gl.tensor:
    """Where a block of weights has its elements, whose second half begins `second` rows after the first."""
    rows = gl.arange(0, 2 * block_rows, gl.SliceLayout(1, layout))
    rows = gl.where(rows < block_rows, rows, rows - block_rows + second)
    return rows[:, None] * in_features + gl.arange(0, block_in, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _shared(
    x: gl.tensor, num_blocks: gl.constexpr, rows: gl.constexpr, columns: gl.constexpr
) -> gl.shared_memory_descriptor:
    """Blocks in shared memory as the tensor cores read them."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, columns], x.dtype.element_ty)
    return gl.allocate_shared_memory(x.dtype.element_ty, [num_blocks, rows, columns], layout)


@gluon.jit(do_not_specialize=["num_pairs"])
def _many_kernel(
    x: gl.tensor, x_scale: gl.tensor, weight: gl.tensor, weight_scale: gl.tensor, pairs: gl.tensor,
    tile_experts: gl.tensor, num_tiles: gl.tensor, shares: gl.tensor, out: gl.tensor,
    num_pairs: int, in_features: int, out_features: int, x_stride: int,
    top_k: gl.constexpr, num_steps: gl.constexpr, num_stages: gl.constexpr, is_gated: gl.constexpr,
    block_rows: gl.constexpr, block_in: gl.constexpr, num_warps: gl.constexpr,
) -> None:  # fmt: skip
    """An item is a tile of rows with a block of weights; `_store` says what becomes of the sums."""
    copied: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [num_warps, 1], [1, 0])
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 2 * block_rows, 32])
    v_buffers = _shared(x, num_stages, block_rows, block_in)
    w_buffers = _shared(x, num_stages, 2 * block_rows, block_in)
    block_out: gl.constexpr = block_rows if is_gated else 2 * block_rows
    num_blocks = out_features // block_out
    num_items = gl.load(num_tiles) * num_blocks
    if gl.program_id(0) >= num_items:
        return
    matrix_rows = 2 * out_features if is_gated else out_features
    second = out_features if is_gated else out_features * 0 + block_rows
    columns = gl.arange(0, block_in, gl.SliceLayout(0, copied))
    offsets = _offsets(second, in_features, block_rows, block_in, copied)
    tile, feature, first_row, sources, exists = _item(
        gl.program_id(0), num_items, num_blocks, block_out, pairs, tile_experts, matrix_rows, num_pairs,
        top_k, block_rows, gl.SliceLayout(1, copied),
    )  # fmt: skip
    for step in gl.static_range(num_stages - 1):
        _fetch_rows(v_buffers.index(step), x, sources, exists, x_stride, columns, step, block_in)
        _fetch_weights(w_buffers.index(step), weight, first_row, in_features, offsets, step, block_in)
        async_copy.commit_group()
    buffer = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        next_tile, next_feature, next_row, next_sources, next_exists = _item(
            item + gl.num_programs(0), num_items, num_blocks, block_out, pairs, tile_experts, matrix_rows,
            num_pairs, top_k, block_rows, gl.SliceLayout(1, copied),
        )  # fmt: skip
        rows = gl.load(pairs + tile * block_rows + gl.arange(0, block_rows, gl.SliceLayout(1, stored)))
        of_rows, of_left, of_right = _factors(
            x_scale, weight_scale, shares, pairs + tile * block_rows, first_row, second, num_pairs, top_k,
            block_rows, line,
        )  # fmt: skip
        total, buffer = _multiply(
            v_buffers, w_buffers, buffer, x, x_stride, weight, in_features, offsets, columns, sources, exists,
            first_row, next_sources, next_exists, next_row, num_steps, num_stages, block_rows, block_in, sums,
        )  # fmt: skip
        _store(
            total, out, rows, num_pairs, out_features, feature, of_rows, of_left, of_right, is_gated, block_rows,
            stored,
        )  # fmt: skip
        tile, feature, first_row, sources, exists = next_tile, next_feature, next_row, next_sources, next_exists
    async_copy.wait_group(0)


def many_gate_up(
    x: QuantizedRows, routing: Routing, weights: ExpertWeights, blocks: RowBlocks, dtype: torch.dtype
) -> torch.Tensor:
    """What is between the projections, for every pair: [T * K, I] of type `dtype`.

    Args:
        x: [T, H], a scale for each row.
        routing, weights: see `moe_layer.tile_products`; weights have a scale for each feature, the activation is SiLU.
        blocks: tiles of `MANY_ROWS` rows, counted.
    """
    out = torch.empty(routing.experts.numel(), weights.down.values.shape[2], dtype=dtype, device=x.values.device)
    _launch(x, weights.gate_up, blocks, None, out, routing.experts.shape[1])
    return out


def many_down(
    inner: QuantizedRows, routing: Routing, weights: ExpertWeights, blocks: RowBlocks, dtype: torch.dtype
) -> torch.Tensor:
    """Every pair's output times its share, [T * K, H] of type `dtype`."""
    out = torch.empty(routing.experts.numel(), weights.down.values.shape[1], dtype=dtype, device=inner.values.device)
    _launch(inner, weights.down, blocks, routing.weights, out, 1)
    return out


def _launch(
    x: QuantizedRows,
    matrix: ExpertMatrix,
    blocks: RowBlocks,
    shares: torch.Tensor | None,
    out: torch.Tensor,
    top_k: int,
) -> None:
    num_pairs, out_features = out.shape
    in_features = x.values.shape[1]
    _many_kernel[(num_multiprocessors(out.device),)](
        x.values,
        x.scales,
        *matrix,
        blocks.pairs,
        blocks.experts,
        blocks.num_used,
        shares,
        out,
        num_pairs,
        in_features,
        out_features,
        x.values.stride(0),
        top_k=top_k,
        num_steps=in_features // BLOCK_IN,
        num_stages=MANY_STAGES,
        is_gated=shares is None,
        block_rows=MANY_ROWS,
        block_in=BLOCK_IN,
        num_warps=NUM_WARPS,
    )
