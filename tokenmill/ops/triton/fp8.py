"""Quantization of rows to float8_e4m3fn with a scale for each row: alone, and as the last step of other kernels.

Called by `ops.fp8`; `quantized` is called inside the kernels of `rms_norm.py` and `activation.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.triton.launch import as_rows, can_overlap, warps_for

FP8_MAX = tl.constexpr(448.0)
INVERSE_FP8_MAX = tl.constexpr(1.0 / 448.0)
MANY_ROWS = 4096
MAX_ELEMENTS = 4096
"""From so many rows on a program takes as many as have so many elements: 80 us became 51 for 65,536 rows of 768."""
MAX_FEW_ROWS = 512
MIN_SCALE = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32: its inverse is finite


@triton.jit
def quantized(values: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """float8_e4m3fn [rows, columns] and scales [rows] of float32 values [rows, columns]."""
    largest = tl.max(tl.abs(values), axis=1)
    scales = tl.maximum(largest * INVERSE_FP8_MAX, MIN_SCALE)
    scaled = values * tl.div_rn(1.0, scales)[:, None]
    return tl.clamp(scaled, -FP8_MAX, FP8_MAX).to(tl.float8e4nv), scales


@triton.jit
def store_quantized(
    row_values: tl.tensor,  # [columns] float32
    values: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    size: tl.tensor,
    block_size: tl.constexpr,
) -> None:
    """Quantize a whole row and store it with its scale."""
    columns = tl.arange(0, block_size)
    quantized_values, row_scales = quantized(row_values[None, :])
    tl.store(values + row * size + columns[None, :], quantized_values, mask=(columns < size)[None, :])
    tl.store(scales + row + tl.zeros([1], tl.int32), row_scales)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_kernel(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    num_rows: int,
    row_stride: int,
    size: int,
    block_rows: tl.constexpr,
    block_size: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """`block_rows` rows."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    rows = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    columns = tl.arange(0, block_size)
    inside = (columns < size)[None, :] & (rows < num_rows)[:, None]
    loaded = tl.load(x + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    quantized_values, row_scales = quantized(loaded)
    tl.store(values + rows[:, None] * size + columns[None, :], quantized_values, mask=inside)
    tl.store(scales + rows, row_scales, mask=rows < num_rows)


@triton.jit
def _static_kernel(
    x: tl.tensor,
    scale: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    row_stride: int,
    size: int,
    block_size: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program a row."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block_size)
    inside = columns < size
    factor = tl.load(scale)
    loaded = tl.load(x + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.clamp(loaded * tl.div_rn(1.0, factor), -FP8_MAX, FP8_MAX)
    tl.store(values + row * size + columns, scaled.to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, factor)


def _row_warps(num_rows: int, block_size: int) -> int:
    """Warps of a program for one row: twice as many where nothing but the time to fetch and store it counts."""
    return warps_for(2 * block_size if num_rows <= MAX_FEW_ROWS else block_size)


def new_quantized(num_rows: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for values [T, D] float8_e4m3fn and scales [T] float32."""
    values = torch.empty(num_rows, size, dtype=torch.float8_e4m3fn, device=device)
    return values, torch.empty(num_rows, dtype=torch.float32, device=device)


def static_quantize_fp8(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [T, D] float8_e4m3fn of x [T, D] over `scale` [1], and that scale for each row [T]."""
    rows = as_rows(x)
    num_rows, size = rows.shape
    values, scales = new_quantized(num_rows, size, x.device)
    if num_rows:
        block_size = triton.next_power_of_2(size)
        overlaps = can_overlap(x.device)
        _static_kernel[(num_rows,)](
            rows,
            scale,
            values,
            scales,
            rows.stride(0),
            size,
            block_size=block_size,
            overlaps=overlaps,
            num_warps=_row_warps(num_rows, block_size),
            launch_pdl=overlaps,
        )
    return values, scales


def per_token_quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [T, D] float8_e4m3fn and scales [T] float32 of x [T, D]."""
    rows = as_rows(x)
    num_rows, size = rows.shape
    values, scales = new_quantized(num_rows, size, x.device)
    if num_rows:
        block_size = triton.next_power_of_2(size)
        block_rows = max(1, MAX_ELEMENTS // block_size) if num_rows >= MANY_ROWS else 1
        _quantize_kernel[(triton.cdiv(num_rows, block_rows),)](
            rows,
            values,
            scales,
            num_rows,
            rows.stride(0),
            size,
            block_rows=block_rows,
            block_size=block_size,
            overlaps=can_overlap(x.device),
            num_warps=_row_warps(num_rows, block_rows * block_size),
            launch_pdl=can_overlap(x.device),
        )
    return values, scales
