"""A router of experts: the product of tokens with its weight, and which experts they choose. Called by `layers.moe`."""

from __future__ import annotations

import torch

from tokenmill.ops.linear import PackedWeight, StreamedWeight, linear
from tokenmill.ops.moe import Routing, route
from tokenmill.ops.moe_plan import has_router_kernel


def choose_experts(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight | StreamedWeight, top_k: int, *, normalize: bool
) -> Routing:
    """`ops.moe.route` of `ops.linear.linear` of x [T, H] with a router's weight [E, H]."""
    if isinstance(weight, StreamedWeight) and not weight.batch_invariant and x.stride(1) == 1:
        num_experts, size = weight.data.shape
        if has_router_kernel(x.shape[0], num_experts, size):
            from tokenmill.ops.triton.moe_router import route_rows

            return Routing(*route_rows(x, weight.data, top_k, normalize))
    return route(linear(x, weight), top_k, normalize=normalize)
