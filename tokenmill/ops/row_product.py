"""The product of one row with a weight, with what stands before and behind it in one launch: the residual addition and
norm before it, a gated activation behind it. One stream's decode step spends on small launches what it need not.

Called by the linear methods of `quantization`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import torch

from tokenmill.ops import activation as activations
from tokenmill.ops.linear_plan import matvec_plan
from tokenmill.ops.rms_norm import add_rms_norm_reference, rms_norm_reference


class PendingNorm(NamedTuple):
    """One row whose residual addition and norm (`ops.rms_norm.add_rms_norm`) are left to the product that takes it.

    Args:
        x: [1, D].
        residual: [1, D], added to x; None: nothing is.
        weight: [D], the norm's factors, of x's type.
        eps: of the norm.
        stream: [1, D], where the product writes the sum; x itself where nothing is added.
    """

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    eps: float
    stream: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> PendingNorm:
        """Leave the norm of x (+ residual) to the product."""
        return cls(x, residual, weight, eps, x if residual is None else torch.empty_like(x))


OneRow: TypeAlias = torch.Tensor | PendingNorm
RowProduct: TypeAlias = Callable[[OneRow, torch.Tensor, torch.Tensor | None, torch.Tensor | None, str], torch.Tensor]


def row_product(
    x: OneRow, weight: torch.Tensor, weight_scale: torch.Tensor | None, bias: torch.Tensor | None, activation: str = ""
) -> torch.Tensor:
    """`activation(norm(x) @ weight.T * weight_scale + bias)` of one row, which `can_fuse` allows.

    Args:
        x: [1, I], or such a row before its norm; then its `stream` is written.
        weight: [O, I] contiguous, of x's type or float8_e4m3fn.
        weight_scale: [O] float32; None: ones.
        bias: [O].
        activation: Hugging Face name of a gated activation, whose gates are the first half of the output features;
            "": none.

    Returns:
        [1, O], or [1, O / 2] with an activation; of x's type. What is normalized is not rounded before the product.
    """
    return IMPLEMENTATIONS[choose(weight.device)](x, weight, weight_scale, bias, activation)


def row_product_reference(
    x: OneRow, weight: torch.Tensor, weight_scale: torch.Tensor | None, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """The definition, in float32."""
    if isinstance(x, PendingNorm):
        dtype, stream = x.x.dtype, x.x
        if x.residual is not None:
            stream = x.stream.copy_(add_rms_norm_reference(x.x, x.residual, x.weight, x.eps)[1])
        row = rms_norm_reference(stream.float(), x.weight, x.eps)
    else:
        dtype, row = x.dtype, x.float()
    product = row @ weight.float().T
    product = product if weight_scale is None else product * weight_scale
    product = (product if bias is None else product + bias.float()).to(dtype)
    return activations.IMPLEMENTATIONS[activation]["reference"](product) if activation else product


def row_product_triton(
    x: OneRow, weight: torch.Tensor, weight_scale: torch.Tensor | None, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """One launch."""
    from tokenmill.ops.triton import row_product as kernels

    row, eps = kernels.Row(x), 0.0
    if isinstance(x, PendingNorm):
        stream = None if x.residual is None else x.stream
        row, eps = kernels.Row(x.x, x.weight, x.residual, stream), x.eps
    plan = matvec_plan(*weight.shape, weight.itemsize)
    return kernels.fused_matvec(row, eps, weight, weight_scale, bias, activation, plan)


IMPLEMENTATIONS: Mapping[str, RowProduct] = MappingProxyType(
    {"reference": row_product_reference, "triton": row_product_triton}
)


def choose(device: torch.device) -> str:
    """Name of the implementation for tensors on this device."""
    return "triton" if device.type == "cuda" else "reference"


def can_fuse(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `row_product` is there for, and worth it for, x [T, I] and a weight [O, I]."""
    if x.shape[0] != 1 or choose(x.device) != "triton" or x.stride(1) != 1:
        return False
    from tokenmill.ops.triton.row_product import comes_in_words

    return comes_in_words(x, weight)
