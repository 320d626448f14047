"""Gated activations in one pass, optionally quantized to float8. Called by `ops.activation`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.triton.fp8 import new_quantized, row_scale, store_scaled
from tokenmill.ops.triton.launch import as_rows, can_overlap, is_interpreted, warps_for

BLOCK_SIZE = 1024
"""Columns of a program that need not see its whole row."""
FP8_MAX_WARPS = 16
FP8_MAX_REGISTERS = 64
"""So that two programs that hold whole rows of 14,336 share a multiprocessor: one loads while the other stores."""
IS_INTERPRETED = tl.constexpr(is_interpreted())  # decided when kernels are defined, on import


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    """Of float32 values, to a few units in the last place; without the steps that care for numbers out of range.

    The unit that computes powers and inverses gives 16 results a cycle: rows of 14,336 wait for it, not for memory.
    """
    if IS_INTERPRETED:
        result = tl.sigmoid(x)
    else:
        result = tl.inline_asm_elementwise(
            """{
                .reg .f32 power;
                ex2.approx.ftz.f32 power, $1;
                add.ftz.f32 power, power, 0f3F800000;
                rcp.approx.ftz.f32 $0, power;
            }""",
            "=f,f",
            [x * -1.4426950408889634],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return result


@triton.jit
def _rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 values rounded to `dtype`, as float32; two at a time, one alone would pass through the unit of powers."""
    if dtype == tl.bfloat16 and not IS_INTERPRETED:
        rounded = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        rounded = x.to(dtype)
    return rounded.to(tl.float32)


@triton.jit
def activated(gate: tl.tensor, is_silu: tl.constexpr) -> tl.tensor:
    """The activation of float32 values: SiLU, or the tanh form of GELU."""
    if is_silu:
        return gate * _sigmoid(gate)
    # 0.5 (1 + tanh(z)) is sigmoid(2 z)
    return gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))


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
    inside = columns < size
    gate = tl.load(gate_up + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + size + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, (activated(gate, is_silu) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_part(
    gate_up: tl.tensor, size: tl.tensor, first: tl.constexpr, block_size: tl.constexpr, is_silu: tl.constexpr
) -> tl.tensor:
    """`block_size` columns of a row from column `first` on, float32; zeros from column `size` on.

    Rounded to the input's type, so that the fused and the separate quantization agree.
    """
    columns = first + tl.arange(0, block_size)
    gate = tl.load(gate_up + columns, mask=columns < size, other=0.0).to(tl.float32)
    up = tl.load(gate_up + size + columns, mask=columns < size, other=0.0).to(tl.float32)
    return _rounded(activated(gate, is_silu) * up, gate_up.dtype.element_ty)


@triton.jit
def _gated_fp8_kernel(
    gate_up: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    row_stride: int,
    size: int,
    is_silu: tl.constexpr,
    first_size: tl.constexpr,
    second_size: tl.constexpr,
    third_size: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One whole row, whose scale depends on all of it, in up to three blocks: fewer idle lanes than in one."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    both = gate_up + row * row_stride
    first = _gated_part(both, size, 0, first_size, is_silu)
    if second_size > 0:
        second = _gated_part(both, size, first_size, second_size, is_silu)
    if third_size > 0:
        third = _gated_part(both, size, first_size + second_size, third_size, is_silu)
    largest = tl.max(tl.abs(first))  # a barrier: no load is begun behind it
    if second_size > 0:
        largest = tl.maximum(largest, tl.max(tl.abs(second)))
    if third_size > 0:
        largest = tl.maximum(largest, tl.max(tl.abs(third)))
    scale = row_scale(largest)
    tl.store(scales + row, scale)
    store_scaled(first, scale, values + row * size, 0, size, first_size)
    if second_size > 0:
        store_scaled(second, scale, values + row * size, first_size, size, second_size)
    if third_size > 0:
        store_scaled(third, scale, values + row * size, first_size + second_size, size, third_size)


def row_blocks(size: int) -> tuple[int, int, int]:
    """Powers of two that cover a row of `size` numbers, none larger than the one before; 0: no more needed."""
    blocks = [0, 0, 0]
    for index in range(3):
        if size > 0:
            block = int(triton.next_power_of_2(size))
            blocks[index] = block // 2 if index < 2 and size < block > BLOCK_SIZE else block
            size -= blocks[index]
    first, second, third = blocks
    return first, second, third


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
        first_size, second_size, third_size = row_blocks(size)
        _gated_fp8_kernel[(num_rows,)](
            rows,
            values,
            scales,
            rows.stride(0),
            size,
            is_silu=is_silu,
            first_size=first_size,
            second_size=second_size,
            third_size=third_size,
            overlaps=can_overlap(gate_up.device),
            num_warps=min(warps_for(triton.next_power_of_2(size)), FP8_MAX_WARPS),
            maxnreg=FP8_MAX_REGISTERS,
            launch_pdl=can_overlap(gate_up.device),
        )
    return values, scales
