"""The sum of what a token's experts give, left to the norm behind it: sum, residual addition, norm and quantization.

Experts whose products are tiles of many tokens give a `PendingSum` (`ops.moe.expert_products`). Called by
`layers.norm`, and by layers that need the sum itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tokenmill.ops.fp8 import QuantizedRows


class PendingSum(NamedTuple):
    """What T tokens' experts give, not added up yet; on GPUs.

    Args:
        of_pairs: [T * K, H], row `t * K + k` from expert k of token t, times its share.
        experts: [T, K] int32.
        first_expert, num_experts: the experts whose rows are there; the others' are not to be read.
    """

    of_pairs: torch.Tensor
    experts: torch.Tensor
    first_expert: int
    num_experts: int

    def total(self) -> torch.Tensor:
        """[T, H], summed in float32, in the order of the routing."""
        from tokenmill.ops.triton.moe_routing import combine

        return combine(*self)


def summed(added: torch.Tensor | PendingSum) -> torch.Tensor:
    """[T, H]: `added`, or its total."""
    return added.total() if isinstance(added, PendingSum) else added


def add_sum_rms_norm(
    added: PendingSum, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.rms_norm.add_rms_norm` of the total and `residual` [T, H], in one launch. All experts must be here."""
    from tokenmill.ops.triton.expert_sum import sum_and_norm

    sums = sum_and_norm(added.of_pairs, residual, weight, eps, quantizes=False)
    return sums.norm, sums.total


def add_sum_rms_norm_fp8(
    added: PendingSum, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[QuantizedRows, torch.Tensor]:
    """`add_sum_rms_norm` with its first result quantized."""
    from tokenmill.ops.triton.expert_sum import sum_and_norm

    sums = sum_and_norm(added.of_pairs, residual, weight, eps, quantizes=True)
    assert sums.scales is not None
    return QuantizedRows(sums.norm, sums.scales), sums.total
