"""The sum of each token's experts with what follows it, in one launch: residual addition, norm, quantization.

Called by `ops.expert_sum`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.triton.fp8 import new_quantized
from tokenmill.ops.triton.launch import can_overlap
from tokenmill.ops.triton.rms_norm import store_normalized

ELEMENTS_PER_WARP = 256


@triton.jit
def _expert_sum_rms_norm_kernel(
    of_pairs: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    plain: tl.tensor,
    scales: tl.tensor,
    num_tokens: int,
    size: int,
    eps: float,
    top_k: tl.constexpr,
    block_k: tl.constexpr,
    block_size: tl.constexpr,
    quantizes: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One token."""
    if overlaps:
        gdc_launch_dependents()
    columns = tl.arange(0, block_size)
    factors = tl.load(weight + columns, mask=columns < size, other=0.0).to(tl.float32)
    if overlaps:
        gdc_wait()  # the factors have been on their way before
    row = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, block_k)[:, None]
    columns = columns[None, :]
    inside = columns < size
    pairs = of_pairs + (row * top_k + ranks) * size + columns  # one block, so that all are on their way at once
    values = tl.load(pairs, mask=(ranks < top_k) & inside, other=0.0).to(tl.float32)
    stream = tl.load(residual + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    values = tl.sum(values, axis=0)[None, :]
    # Rounded where separate launches round.
    rounded = (values.to(of_pairs.dtype.element_ty).to(tl.float32) + stream).to(total.dtype.element_ty)
    tl.store(total + row * size + columns, rounded, mask=inside)
    rows = row + tl.arange(0, 1)
    store_normalized(
        rounded.to(tl.float32), factors, eps, out, plain, scales, rows, num_tokens, size, of_pairs.dtype.element_ty,
        quantizes,
    )  # fmt: skip


class SumAndNorm(NamedTuple):
    """What `sum_and_norm` gives.

    Args:
        total: [T, H], the residual stream.
        norm: [T, H], its norm; quantized if that was asked for, with `scales` [T].
        scales: None: not quantized.
    """

    total: torch.Tensor
    norm: torch.Tensor
    scales: torch.Tensor | None


def sum_and_norm(
    of_pairs: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    quantizes: bool,
) -> SumAndNorm:
    """Sums over the K pairs of each token in of_pairs [T * K, H], added to `residual` [T, H], and its norm."""
    num_tokens, size = residual.shape
    top_k = of_pairs.shape[0] // max(num_tokens, 1)
    total = torch.empty(num_tokens, size, dtype=residual.dtype, device=residual.device)
    if quantizes:
        out, scales = new_quantized(num_tokens, size, residual.device)
    else:
        out, scales = torch.empty_like(total, dtype=of_pairs.dtype), None
    if num_tokens:
        block_size = triton.next_power_of_2(size)
        overlaps = can_overlap(residual.device)
        _expert_sum_rms_norm_kernel[(num_tokens,)](
            of_pairs,
            residual if residual.is_contiguous() else residual.contiguous(),
            weight,
            total,
            out,
            None,
            scales,
            num_tokens,
            size,
            eps,
            top_k=top_k,
            block_k=triton.next_power_of_2(top_k),
            block_size=block_size,
            quantizes=quantizes,
            overlaps=overlaps,
            num_warps=max(1, min(16, block_size // ELEMENTS_PER_WARP)),
            launch_pdl=overlaps,
        )
    return SumAndNorm(total, out, scales)
