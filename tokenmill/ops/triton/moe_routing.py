"""Routing on the device: the experts of each token, and the sum of each token's experts.

Nothing of it is known to the host, so a step with it can be captured in a CUDA graph. Called by `ops.moe` and
`moe_layer.py`; `moe_sorting.py` has what is between the two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenmill.ops.triton.launch import can_overlap, warps_for


@triton.jit
def _route_kernel(
    logits: tl.tensor,
    experts_out: tl.tensor,
    weights_out: tl.tensor,
    num_experts: int,
    row_stride: int,
    top_k: tl.constexpr,
    normalize: tl.constexpr,
    block_experts: tl.constexpr,
    block_k: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """One token."""
    if overlaps:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
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
            top_k=top_k,
            normalize=normalize,
            block_experts=triton.next_power_of_2(num_experts),
            block_k=triton.next_power_of_2(top_k),
            overlaps=overlaps,
            num_warps=1,
            launch_pdl=overlaps,
        )
    return experts, weights


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
