"""Gated activations in one pass, optionally quantized to float8. Called by `ops.activation`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.triton.fp8 import new_quantized, store_quantized
from tokenmill.ops.triton.launch import as_rows, can_overlap, warps_for

BLOCK_SIZE = 1024
"""Columns of a program that need not see its whole row."""
FP8_MAX_WARPS = 16
FP8_MAX_REGISTERS = 64
"""So that two programs that hold whole rows of 14,336 share a multiprocessor: one loads while the other stores."""


@triton.jit
def activated(gate: tl.tensor, is_silu: tl.constexpr) -> tl.tensor:
    """The activation of float32 values: SiLU, or the tanh form of GELU."""
    if is_silu:
        return gate * tl.sigmoid(gate)
    # 0.5 (1 + tanh(z)) is sigmoid(2 z)
    return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))


@triton.jit
def _load_gated(
    row: tl.tensor,  # pointer to the row's first gate
    columns: tl.tensor,
    size: tl.tensor,
    is_silu: tl.constexpr,
) -> tl.tensor:
    """float32 of the activated gates in some columns, times their ups; zeros from column `size` on."""
    inside = columns < size
    gate = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + size + columns, mask=inside, other=0.0).to(tl.float32)
    return activated(gate, is_silu) * up


@triton.jit
def _gated_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    row_stride: int,
    size: int,
    is_silu: tl.constexpr,
    block_size: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """`block_size` columns of one row."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block_size + tl.arange(0, block_size)
    gated = _load_gated(gate_up + row * row_stride, columns, size, is_silu)
    tl.store(out + row * size + columns, gated.to(out.dtype.element_ty), mask=columns < size)


@triton.jit
def _gated_fp8_kernel(
    gate_up: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    row_stride: int,
    size: int,
    is_silu: tl.constexpr,
    block_size: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One whole row: its scale depends on all of it."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    gated = _load_gated(gate_up + row * row_stride, tl.arange(0, block_size), size, is_silu)
    # Rounded to the input's type first, so that the fused and the separate quantization agree.
    rounded = gated.to(gate_up.dtype.element_ty).to(tl.float32)
    store_quantized(rounded, values, scales, row, size, block_size)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of [..., 2 I], contiguous [..., I]."""
    return _gated(gate_up, is_silu=True)


def gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`gelu(gate) * up` of [..., 2 I], contiguous [..., I]."""
    return _gated(gate_up, is_silu=False)


def silu_and_mul_fp8(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu(gate) * up` of [T, 2 I], quantized: values [T, I] and scales [T]."""
    return _gated_fp8(gate_up, is_silu=True)


def gelu_tanh_and_mul_fp8(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`gelu(gate) * up` of [T, 2 I], quantized: values [T, I] and scales [T]."""
    return _gated_fp8(gate_up, is_silu=False)


def _gated(gate_up: torch.Tensor, *, is_silu: bool) -> torch.Tensor:
    size = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        rows = as_rows(gate_up)
        block_size = min(BLOCK_SIZE, triton.next_power_of_2(size))
        grid = (rows.shape[0], triton.cdiv(size, block_size))
        _gated_kernel[grid](
            rows,
            out,
            rows.stride(0),
            size,
            is_silu=is_silu,
            block_size=block_size,
            overlaps=can_overlap(gate_up.device),
            num_warps=warps_for(2 * block_size),
            launch_pdl=can_overlap(gate_up.device),
        )
    return out


def _gated_fp8(gate_up: torch.Tensor, *, is_silu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows = as_rows(gate_up)
    num_rows, size = rows.shape[0], rows.shape[1] // 2
    values, scales = new_quantized(num_rows, size, gate_up.device)
    if num_rows:
        block_size = triton.next_power_of_2(size)
        _gated_fp8_kernel[(num_rows,)](
            rows,
            values,
            scales,
            rows.stride(0),
            size,
            is_silu=is_silu,
            block_size=block_size,
            overlaps=can_overlap(gate_up.device),
            num_warps=min(warps_for(block_size), FP8_MAX_WARPS),
            maxnreg=FP8_MAX_REGISTERS,
            launch_pdl=can_overlap(gate_up.device),
        )
    return values, scales
