"""Experts of many tokens on a GPU, launch after launch: quantize, sort, multiply, multiply; the sum is left to others.

The products are those of `moe_tiles.py`, or of `moe_many.py` where arithmetic takes the time. Called by `ops.moe`.
"""

from __future__ import annotations

import torch

from tokenmill.ops.expert_sum import PendingSum
from tokenmill.ops.fp8 import QuantizedRows, per_token_quantize_fp8, static_quantize_fp8
from tokenmill.ops.moe import ExpertWeights, Routing
from tokenmill.ops.moe_plan import MANY_ROWS, GroupedPlan, fits_many
from tokenmill.ops.platform import is_hopper
from tokenmill.ops.triton.launch import is_interpreted
from tokenmill.ops.triton.moe_scales import FEATURE_SCALES, quantize_groups, scale_kind_of
from tokenmill.ops.triton.moe_sorting import MAX_TOGETHER, sort_many_pairs, sort_pairs
from tokenmill.ops.triton.moe_tiles import grouped_down, grouped_gate_up


def tile_products(
    x: torch.Tensor,
    routing: Routing,
    weights: ExpertWeights,
    plan: GroupedPlan,
    quantized: QuantizedRows | None = None,
) -> PendingSum:
    """What all pairs of token and expert give: quantize, sort, multiply, multiply.

    Args:
        x: [T, H].
        routing: the experts of the tokens.
        weights: of this rank's experts.
        plan: how the products are cut.
        quantized: x with a scale for each row, if it was quantized already; else it is here, for float8 weights.
    """
    num_pairs = routing.experts.numel()
    of_rank = routing.experts, weights.first_expert, weights.num_experts
    by_token = weights.scales_inner_by_token(num_pairs)
    stays = programs_stay(x, weights, plan, num_pairs)
    sort = sort_many_pairs if stays or num_pairs > MAX_TOGETHER else sort_pairs
    blocks = sort(*of_rank, plan.block_rows)
    values, scales = _operand(x, weights) if quantized is None else quantized
    inner: torch.Tensor | QuantizedRows
    if stays:
        from tokenmill.ops.triton.moe_many import many_down, many_gate_up

        assert scales is not None
        inner = many_gate_up(QuantizedRows(values, scales), routing, weights, blocks, x.dtype)
        of_pairs = many_down(_quantized(inner, weights), routing, weights, blocks, x.dtype)
    else:
        unquantized = x.dtype if by_token else None
        inner = grouped_gate_up(values, scales, routing, weights, blocks, plan, unquantized=unquantized)
        if isinstance(inner, torch.Tensor) and by_token:
            inner = _quantized(inner, weights)
        of_pairs = grouped_down(inner, routing, weights, blocks, plan, x.dtype)
    return PendingSum(of_pairs, *of_rank)


def programs_stay(x: torch.Tensor, weights: ExpertWeights, plan: GroupedPlan, num_pairs: int) -> bool:
    """Whether the products are those of `moe_many.py`."""
    return (
        plan.block_rows == MANY_ROWS
        and weights.scales_inner_by_token(num_pairs)
        and is_hopper(x.device)
        and not is_interpreted()
        and x.element_size() == 2
        and scale_kind_of(weights.gate_up) == scale_kind_of(weights.down) == FEATURE_SCALES.value
        and weights.activation == "silu"
        and fits_many(*weights.down.values.shape[1:])
    )


def _quantized(inner: torch.Tensor, weights: ExpertWeights) -> QuantizedRows:
    """What is between the projections, with a scale for each row."""
    scales = weights.input_scales
    return QuantizedRows(*(per_token_quantize_fp8(inner) if scales is None else static_quantize_fp8(inner, scales[1])))


def _operand(x: torch.Tensor, weights: ExpertWeights) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x as the first product takes it, and its scales."""
    if weights.gate_up.scales is None:
        return x, None
    if weights.input_scales is not None:
        return static_quantize_fp8(x, weights.input_scales[0])
    return quantize_groups(x) if weights.gate_up.is_block_scaled else per_token_quantize_fp8(x)
