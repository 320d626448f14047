"""Root-mean-square norm in one pass: optionally after the residual addition, optionally quantized to float8.

Called by `ops.rms_norm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.triton.fp8 import quantized
from tokenmill.ops.triton.launch import as_rows, can_overlap, warps_for

ELEMENTS_PER_PROGRAM = 2048
"""Short rows (the heads of a query) share a program until it holds this many elements."""


@triton.jit
def store_normalized(
    values: tl.tensor,  # [rows, columns] float32, zeros from column `size` on
    factors: tl.tensor,  # [columns] float32, zeros likewise
    eps: tl.tensor,
    out: tl.tensor,
    plain: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    dtype: tl.constexpr,
    quantizes: tl.constexpr,
) -> None:
    """Store the norm of some rows: to `out`, or quantized to `out` and `scales` and as it is to `plain`, if given."""
    columns = tl.arange(0, values.shape[1])
    mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
    offsets = rows.to(tl.int64)[:, None] * size + columns[None, :]
    mean_square = tl.sum(values * values, axis=1) / size
    normalized = values * tl.rsqrt(mean_square + eps)[:, None] * factors[None, :]
    if quantizes:
        # Rounded to the input's type first, so that the fused and the separate quantization agree.
        normalized = normalized.to(dtype)
        if plain is not None:
            tl.store(plain + offsets, normalized, mask=mask)
        quantized_values, row_scales = quantized(normalized.to(tl.float32))
        tl.store(out + offsets, quantized_values, mask=mask)
        tl.store(scales + rows, row_scales, mask=rows < num_rows)
    else:
        tl.store(out + offsets, normalized.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    plain: tl.tensor,
    total: tl.tensor,
    scales: tl.tensor,
    num_rows: int,
    rows_per_token: int,
    token_stride: int,
    row_stride: int,
    size: int,
    eps: float,
    block_rows: tl.constexpr,
    block_size: tl.constexpr,
    adds_residual: tl.constexpr,
    quantizes: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """`block_rows` rows a program; row r of x is row `r % rows_per_token` of token `r // rows_per_token`.

    A quantized norm goes to `out`, and as it was before to `plain` if that is given.
    """
    if overlaps:
        gdc_launch_dependents()
    columns = tl.arange(0, block_size)
    factors = tl.load(weight + columns, mask=columns < size, other=0.0).to(tl.float32)
    if overlaps:
        gdc_wait()  # the factors have been on their way before
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
    offsets = (rows // rows_per_token).to(tl.int64) * token_stride + (rows % rows_per_token) * row_stride
    packed_offsets = rows.to(tl.int64)[:, None] * size + columns[None, :]
    values = tl.load(x + offsets[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if adds_residual:
        values += tl.load(residual + packed_offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + packed_offsets, rounded, mask=mask)
        values = rounded.to(tl.float32)  # the norm sees the residual stream as the next layer will
    store_normalized(values, factors, eps, out, plain, scales, rows, num_rows, size, x.dtype.element_ty, quantizes)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm of x [..., D], contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, out, None, None)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of the sum, sum) of x and residual [..., D], both contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    _launch(x, residual, weight, eps, out, total, None)
    return out, total


def rms_norm_fp8(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x [T, D], quantized: values [T, D] and scales [T]."""
    out, scales = _quantized_outputs(x)
    _launch(x, None, weight, eps, out, None, scales)
    return out, scales


def add_rms_norm_fp8(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of the sum of x and residual [T, D], quantized: values [T, D], scales [T], and the sum [T, D]."""
    out, scales = _quantized_outputs(x)
    total = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    _launch(x, residual, weight, eps, out, total, scales)
    return out, scales, total


def rms_norm_both(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of x [T, D]: as it is, and quantized (values [T, D], scales [T])."""
    out, scales = _quantized_outputs(x)
    plain = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, out, None, scales, plain)
    return plain, out, scales


def add_rms_norm_both(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of the sum of x and residual [T, D]: as it is, quantized (values [T, D], scales [T]), and the sum."""
    out, scales = _quantized_outputs(x)
    plain = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    _launch(x, residual, weight, eps, out, total, scales, plain)
    return plain, out, scales, total


def _quantized_outputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return values, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor | None,
    scales: torch.Tensor | None,
    plain: torch.Tensor | None = None,
) -> None:
    size = x.shape[-1]
    num_rows = x.numel() // size
    if num_rows == 0:
        return
    if x.dim() == 3 and x.stride(-1) == 1:  # heads inside the merged projection: no copy
        rows_per_token, token_stride, row_stride = x.shape[1], x.stride(0), x.stride(1)
    else:
        x = as_rows(x)
        rows_per_token, token_stride, row_stride = 1, x.stride(0), 0
    block_size = triton.next_power_of_2(size)
    block_rows = max(1, min(triton.next_power_of_2(num_rows), ELEMENTS_PER_PROGRAM // block_size))
    _rms_norm_kernel[(triton.cdiv(num_rows, block_rows),)](
        x,
        residual if residual is None else residual.contiguous(),
        weight,
        out,
        plain,
        total,
        scales,
        num_rows,
        rows_per_token,
        token_stride,
        row_stride,
        size,
        eps,
        block_rows=block_rows,
        block_size=block_size,
        adds_residual=residual is not None,
        quantizes=scales is not None,
        overlaps=can_overlap(x.device),
        num_warps=warps_for(2 * block_rows * block_size),
        launch_pdl=can_overlap(x.device),
    )
