"""The most likely token of each row in two launches: a device full of programs per row, then one. For `ops.argmax`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.triton.launch import can_overlap, warps_for

BLOCK_SIZE = 4096
"""Logits that a program looks at at a time."""
WANTED_PROGRAMS = 1024
NO_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def _first_of_largest(values: tl.tensor, indices: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The largest of `values` [N] and the smallest of `indices` at which it is."""
    largest = tl.max(values, axis=0)
    return largest, tl.min(tl.where(values == largest, indices, NO_INDEX), axis=0)


@triton.jit
def _parts_kernel(
    logits: tl.tensor,
    largest: tl.tensor,
    indices: tl.tensor,
    row_stride: int,
    size: int,
    part_size: int,
    block_size: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """Grid: rows, parts. NaN counts as infinity: either makes the row invalid."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, block_size)
    best = tl.full([block_size], float("-inf"), tl.float32)
    where = part * part_size + columns
    for start in range(part * part_size, tl.minimum((part + 1) * part_size, size), block_size):
        index = start + columns
        values = tl.load(logits + row * row_stride + index, mask=index < size, other=float("-inf")).to(tl.float32)
        values = tl.where(values == values, values, float("inf"))
        is_larger = values > best
        best, where = tl.where(is_larger, values, best), tl.where(is_larger, index, where)
    value, index = _first_of_largest(best, where)
    place = row * tl.num_programs(1) + part
    tl.store(largest + place, value)
    tl.store(indices + place, index)


@triton.jit
def _choose_kernel(
    largest: tl.tensor,
    indices: tl.tensor,
    chosen: tl.tensor,
    invalid: tl.tensor,
    token_ids: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    token_stride: int,
    num_parts: tl.constexpr,
    block_parts: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program a row."""
    if overlaps:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, block_parts)
    inside = parts < num_parts
    values = tl.load(largest + row * num_parts + parts, mask=inside, other=float("-inf"))
    value, index = _first_of_largest(values, tl.load(indices + row * num_parts + parts, mask=inside, other=NO_INDEX))
    is_invalid = tl.abs(value) == float("inf")
    token = tl.where(is_invalid, 0, index).to(tl.int64)
    tl.store(chosen + row, token)
    tl.store(invalid + row, is_invalid.to(tl.int8))
    if token_ids is not None:
        tl.store(token_ids + tl.load(slots + row) * token_stride + tl.load(positions + row), token)


def most_likely(
    logits: torch.Tensor,
    token_ids: torch.Tensor | None,
    slots: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token [R] int64, invalid [R] bool) of logits [R, V]; see `ops.argmax.most_likely`."""
    num_rows, size = logits.shape
    device = logits.device
    chosen = torch.empty(num_rows, dtype=torch.int64, device=device)
    invalid = torch.empty(num_rows, dtype=torch.int8, device=device)
    if num_rows == 0:
        return chosen, invalid.view(torch.bool)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    block_size = min(BLOCK_SIZE, triton.next_power_of_2(size))
    num_blocks = triton.cdiv(size, block_size)
    blocks_per_part = triton.cdiv(num_blocks, max(1, WANTED_PROGRAMS // num_rows))
    num_parts = triton.cdiv(num_blocks, blocks_per_part)
    largest = torch.empty(num_rows, num_parts, dtype=torch.float32, device=device)
    indices = torch.empty(num_rows, num_parts, dtype=torch.int32, device=device)
    overlaps = can_overlap(device)
    _parts_kernel[(num_rows, num_parts)](
        logits,
        largest,
        indices,
        logits.stride(0),
        size,
        blocks_per_part * block_size,
        block_size=block_size,
        overlaps=overlaps,
        num_warps=warps_for(block_size),
        launch_pdl=overlaps,
    )
    _choose_kernel[(num_rows,)](
        largest,
        indices,
        chosen,
        invalid,
        token_ids,
        slots,
        positions,
        0 if token_ids is None else token_ids.stride(0),
        num_parts=num_parts,
        block_parts=triton.next_power_of_2(num_parts),
        overlaps=overlaps,
        num_warps=1,
        launch_pdl=overlaps,
    )
    return chosen, invalid.view(torch.bool)
