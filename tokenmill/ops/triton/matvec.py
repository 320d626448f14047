"""The product of one row with a weight: words at a time where it comes in words, else by a plainer kernel.

Weights are of x's type or float8_e4m3fn with a scale for each output feature. Called by `ops.linear` and `ops.fp8`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.linear_plan import StreamPlan
from tokenmill.ops.triton.launch import can_overlap
from tokenmill.ops.triton.linear import load_weights, scaled
from tokenmill.ops.triton.row_product import Row, comes_in_words, fused_matvec

VECTOR = tl.constexpr(8)
"""Columns of a thread that lie side by side: 16 bytes of x, so that its x and its weights meet in registers."""
ELEMENTS_PER_WARP = 2048
"""What the registers of a warp hold at a time, since they hold each element's product."""


@triton.jit
def _load_row(x: tl.tensor, columns: tl.tensor, size: tl.tensor, is_inside: tl.constexpr) -> tl.tensor:
    """A block of x in float32, zeros from column `size` on."""
    if is_inside:
        return tl.load(x + columns).to(tl.float32)
    return tl.load(x + columns, mask=columns < size, other=0.0).to(tl.float32)


@triton.jit
def _matvec_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    out_features: int,
    in_features: int,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    is_even: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One program: `block_out` output features, over all input features."""
    if overlaps:
        gdc_launch_dependents()
    features = tl.program_id(0) * block_out + tl.arange(0, block_out)
    is_feature = features < out_features
    columns = tl.max_contiguous(tl.arange(0, block_in), VECTOR)
    # Features past the end read the last one again: no mask on the loads that matter.
    starts = tl.minimum(features, out_features - 1).to(tl.int64) * in_features
    weights = weight + starts[:, None] + columns[None, :]
    w = load_weights(weights, columns, in_features, is_even)
    if overlaps:
        gdc_wait()  # x is there only now; the first weights have been on their way before
    total = w.to(tl.float32) * _load_row(x, columns, in_features, is_even)[None, :]
    for start in range(block_in, in_features, block_in):
        w = load_weights(weights + start, columns, in_features - start, is_even)
        total += w.to(tl.float32) * _load_row(x + start, columns, in_features - start, is_even)[None, :]
    result = scaled(tl.sum(total, axis=1, keep_dims=True), features, is_feature, weight_scale, bias)
    tl.store(out + features[:, None], result.to(out.dtype.element_ty), mask=is_feature[:, None])


def matvec(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    plan: StreamPlan,
) -> torch.Tensor:
    """`x @ weight.T * weight_scale + bias` of one row.

    Args:
        x: [1, I].
        weight: [O, I] contiguous, of x's type or float8_e4m3fn.
        weight_scale: [O] float32; None: ones.
        bias: [O].
        plan: block sizes.

    Returns:
        [1, O], of x's type.
    """
    if comes_in_words(x, weight):
        return fused_matvec(Row(x), 0.0, weight, weight_scale, bias, "", plan)
    out_features, in_features = weight.shape
    assert x.shape == (1, in_features) and x.stride(1) == 1 and weight.is_contiguous()
    out = torch.empty(1, out_features, dtype=x.dtype, device=x.device)
    overlaps = can_overlap(x.device)
    _matvec_kernel[(triton.cdiv(out_features, plan.block_out),)](
        x,
        weight,
        weight_scale,
        bias,
        out,
        out_features,
        in_features,
        block_out=plan.block_out,
        block_in=plan.block_in,
        is_even=in_features % plan.block_in == 0,
        overlaps=overlaps,
        num_warps=max(plan.num_warps, plan.block_out * plan.block_in // ELEMENTS_PER_WARP),
        launch_pdl=overlaps,
    )
    return out
