"""Scales of float8 in products with experts: what kernels multiply with, and activations quantized by groups.

Called by `moe_layer.py`, `moe_tiles.py`, `moe_pairs.py` and `ops.moe`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.fp8 import FP8_DTYPE
from tokenmill.ops.moe import ExpertMatrix
from tokenmill.ops.moe_plan import SCALE_GROUP
from tokenmill.ops.triton.fp8 import quantized
from tokenmill.ops.triton.launch import as_rows, can_overlap, warps_for

GROUP = tl.constexpr(SCALE_GROUP)
NO_SCALES = tl.constexpr(0)
FEATURE_SCALES = tl.constexpr(1)
BLOCK_SCALES = tl.constexpr(2)
"""What multiplies a weight: nothing, a factor for each output feature, a factor for each block of 128 x 128."""


@triton.jit
def load_block(addresses: tl.tensor, mask: tl.tensor, is_inside: tl.constexpr) -> tl.tensor:
    """A block from memory; zeros where the mask says so, unless all of it is known to be inside."""
    if is_inside:
        return tl.load(addresses)
    return tl.load(addresses, mask=mask, other=0.0)


@triton.jit
def block_scales(scales: tl.tensor, features: tl.tensor, start: tl.tensor, in_features: tl.tensor) -> tl.tensor:
    """The factors of the features' weights in the block of input features from `start`."""
    blocks_in = (in_features + GROUP - 1) // GROUP
    return tl.load(scales + (features // GROUP).to(tl.int64) * blocks_in + start // GROUP)


@triton.jit
def _quantize_groups_kernel(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    row_stride: int,
    size: int,
    num_groups: int,
    block_groups: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One row."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, block_groups)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = columns < size
    loaded = tl.load(x + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    quantized_values, group_scales = quantized(loaded)
    tl.store(values + row * size + columns, quantized_values, mask=inside)
    tl.store(scales + row * num_groups + groups, group_scales, mask=groups < num_groups)


def scale_kind_of(matrix: ExpertMatrix) -> int:
    """`NO_SCALES`, `FEATURE_SCALES` or `BLOCK_SCALES`."""
    if matrix.scales is None:
        return int(NO_SCALES.value)
    return int(BLOCK_SCALES.value if matrix.is_block_scaled else FEATURE_SCALES.value)


def quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [T, D] float8_e4m3fn and scales [T, ceil(D / 128)] float32 of x [T, D]."""
    rows = as_rows(x)
    num_rows, size = rows.shape
    num_groups = triton.cdiv(size, SCALE_GROUP)
    values = torch.empty(num_rows, size, dtype=FP8_DTYPE, device=x.device)
    scales = torch.empty(num_rows, num_groups, dtype=torch.float32, device=x.device)
    if num_rows:
        block_groups = triton.next_power_of_2(num_groups)
        overlaps = can_overlap(x.device)
        _quantize_groups_kernel[(num_rows,)](
            rows,
            values,
            scales,
            rows.stride(0),
            size,
            num_groups,
            block_groups=block_groups,
            overlaps=overlaps,
            num_warps=warps_for(block_groups * SCALE_GROUP),
            launch_pdl=overlaps,
        )
    return values, scales
