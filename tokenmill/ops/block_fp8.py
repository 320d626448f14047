"""Products with a float8 weight that has a scale for each block of 128 x 128 (DeepSeek-V3's format, arXiv 2412.19437).

One row is multiplied as it is, more are quantized with a scale for each 128 features. Called by
`quantization.fp8_checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from tokenmill.ops.moe import ExpertMatrix, choose, quantize_groups_fp8
from tokenmill.ops.moe_plan import INVARIANT_PLAN, SCALE_GROUP, down_pair_plan


@dataclass(frozen=True, slots=True)
class BlockScaledWeight:
    """A weight with a scale for each block; a mixture of one expert, to the kernels.

    Args:
        matrix: values [1, O, I] float8_e4m3fn, scales [1, ceil(O / 128), ceil(I / 128)] float32.
        expert: [1, 1] int32 zero, the expert of one row.
        share: [1, 1] float32 one, its share.
        batch_invariant: give each row the same bits in any company: a single one is quantized, too.
    """

    matrix: ExpertMatrix
    expert: torch.Tensor
    share: torch.Tensor
    batch_invariant: bool = False

    @classmethod
    def of(cls, values: torch.Tensor, scales: torch.Tensor, *, batch_invariant: bool = False) -> BlockScaledWeight:
        """The weight with values [O, I] and scales [ceil(O / 128), ceil(I / 128)]."""
        device = values.device
        expert, share = torch.zeros(1, 1, dtype=torch.int32, device=device), torch.ones(1, 1, device=device)
        return cls(ExpertMatrix(values[None], scales[None]), expert, share, batch_invariant)


def block_scaled_linear(x: torch.Tensor, weight: BlockScaledWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: [T, I].
        weight: [O, I].
        bias: [O].

    Returns:
        [T, O], of x's type.
    """
    return IMPLEMENTATIONS[choose(x.device, x.dtype)](x, weight, bias)


def block_scaled_linear_reference(
    x: torch.Tensor, weight: BlockScaledWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """The definition: a product of the dequantized factors, in float32."""
    rows = x.float()
    if x.shape[0] > 1:
        values, scales = quantize_groups_fp8(x)
        rows = values.float() * scales.repeat_interleave(SCALE_GROUP, 1)[:, : x.shape[1]]
    product = rows @ weight.matrix.dequantized(0, torch.float32).T
    return (product if bias is None else product + bias.float()).to(x.dtype)


def block_scaled_linear_triton(x: torch.Tensor, weight: BlockScaledWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """The kernels of a mixture of experts, with one expert."""
    if x.shape[0] != 1 or weight.batch_invariant:
        from tokenmill.ops.triton.moe_tiles import block_scaled_product

        plan = INVARIANT_PLAN if weight.batch_invariant else None
        return block_scaled_product(quantize_groups_fp8(x), weight.matrix, bias, x.dtype, plan)
    from tokenmill.ops.triton.moe_pairs import project_pairs

    pair_plan = down_pair_plan(*weight.matrix.values.shape[1:])
    product = project_pairs(x.contiguous(), weight.matrix, weight.expert, weight.share, 0, pair_plan)
    return product if bias is None else product.add_(bias)


IMPLEMENTATIONS: Mapping[str, Callable[[torch.Tensor, BlockScaledWeight, torch.Tensor | None], torch.Tensor]] = (
    MappingProxyType({
        "reference": block_scaled_linear_reference,
        "torch": block_scaled_linear_reference,
        "triton": block_scaled_linear_triton,
    })
)  # fmt: skip
