"""A router of experts: the product of tokens with its weight, and which experts they choose.

One launch for both where the tokens are so few that launches decide. Called by `layers.moe`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenmill.ops.linear import PackedWeight, StreamedWeight, linear, pack_linear_weight
from tokenmill.ops.moe import Routing, route
from tokenmill.ops.moe_plan import MAX_ROUTED_TOKENS, MIN_ROUTED_TOKENS, ROUTER_BLOCK_ROWS, takes_one_launch


@dataclass(frozen=True, slots=True)
class RouterWeight:
    """A router's weight [E, H], prepared for its device.

    Args:
        product: for `ops.linear.linear`.
        arrivals: counters of the launch that chooses as well; belong to this weight alone. None: product and choice are
            always apart.
    """

    product: torch.Tensor | PackedWeight | StreamedWeight
    arrivals: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: torch.Tensor, *, batch_invariant: bool = False) -> RouterWeight:
        """`weight` [E, H] prepared; `batch_invariant`: see `ops.linear.pack_linear_weight`."""
        product = pack_linear_weight(weight, batch_invariant=batch_invariant)
        if batch_invariant or not isinstance(product, StreamedWeight) or not takes_one_launch(*weight.shape):
            return cls(product)
        num_blocks = MAX_ROUTED_TOKENS // ROUTER_BLOCK_ROWS
        return cls(product, torch.zeros(num_blocks, dtype=torch.int32, device=weight.device))


def choose_experts(x: torch.Tensor, weight: RouterWeight, top_k: int, *, normalize: bool) -> Routing:
    """`ops.moe.route` of the product of x [T, H] with a router's weight, rounded to x's type."""
    is_fitting = MIN_ROUTED_TOKENS <= x.shape[0] <= MAX_ROUTED_TOKENS and x.stride(1) == 1
    if weight.arrivals is None or not is_fitting:
        return route(linear(x, weight.product), top_k, normalize=normalize)
    from tokenmill.ops.triton.moe_router import route_rows

    assert isinstance(weight.product, StreamedWeight)
    return Routing(*route_rows(x, weight.product.data, weight.arrivals, top_k, normalize))
