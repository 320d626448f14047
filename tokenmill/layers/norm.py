"""Root-mean-square norms, with the residual addition in front of them. Called by models."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from tokenmill.layers.context import LayerContext
from tokenmill.ops.expert_sum import PendingSum, add_sum_rms_norm, add_sum_rms_norm_fp8
from tokenmill.ops.rms_norm import (
    add_rms_norm,
    add_rms_norm_both,
    add_rms_norm_fp8,
    rms_norm,
    rms_norm_both,
    rms_norm_fp8,
)
from tokenmill.ops.row_product import PendingNorm
from tokenmill.quantization.base import Added, PlainAndQuantized, RowForm, Rows


class TakesRows(Protocol):
    """What follows a norm: a linear layer, or a block that begins with some."""

    def row_form(self, x: torch.Tensor) -> RowForm:
        """The form in which rows like x [T, size] are best given."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, times `weight`."""

    def __init__(self, size: int, eps: float, context: LayerContext) -> None:
        super().__init__()
        self.eps = eps
        ones = torch.ones(size, dtype=context.dtype, device=context.device)
        self.weight = nn.Parameter(ones, requires_grad=False)

    @property
    def scale(self) -> torch.Tensor:
        """What the normalized input is multiplied by: [size]."""
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x [..., size]."""
        return rms_norm(x, self.scale, self.eps)

    def add_and_norm(self, x: Added, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(normalized sum, sum) of x and residual [T, size].

        Without a residual x starts the stream; if it is the residual, the layer before has added to it (`add_to`).
        """
        if isinstance(x, PendingSum):
            assert residual is not None, "experts add to a residual stream"
            return add_sum_rms_norm(x, residual, self.scale, self.eps)
        if residual is None or x is residual:
            return rms_norm(x, self.scale, self.eps), x
        return add_rms_norm(x, residual, self.scale, self.eps)

    def add_and_norm_for(
        self, consumer: TakesRows, x: Added, residual: torch.Tensor | None
    ) -> tuple[Rows | PlainAndQuantized, torch.Tensor]:
        """`add_and_norm`, the normalized sum in the form that `consumer` takes fastest.

        The sum may be written by the consumer only: nothing may read it before.
        """
        if isinstance(x, PendingSum):
            if residual is not None and consumer.row_form(residual) is RowForm.QUANTIZED:
                return add_sum_rms_norm_fp8(x, residual, self.scale, self.eps)
            return self.add_and_norm(x, residual)
        form = consumer.row_form(x)
        if x is residual:
            residual = None
        if form is RowForm.PENDING_NORM and self.scale.dtype == x.dtype:
            row = PendingNorm.of(x, residual, self.scale, self.eps)
            return row, row.stream
        if form is RowForm.PLAIN_AND_QUANTIZED and residual is not None:
            normalized, quantized, total = add_rms_norm_both(x, residual, self.scale, self.eps)
            return PlainAndQuantized(normalized, quantized), total
        if form is RowForm.PLAIN_AND_QUANTIZED:
            return PlainAndQuantized(*rms_norm_both(x, self.scale, self.eps)), x
        if form is RowForm.QUANTIZED and residual is not None:
            return add_rms_norm_fp8(x, residual, self.scale, self.eps)
        if form is RowForm.QUANTIZED:
            return rms_norm_fp8(x, self.scale, self.eps), x
        return self.add_and_norm(x, residual)


class GemmaRMSNorm(RMSNorm):
    """Gemma's norm: the factor is `1 + weight`, in float32, so that a weight of zero is the identity."""

    def __init__(self, size: int, eps: float, context: LayerContext) -> None:
        super().__init__(size, eps, context)
        nn.init.zeros_(self.weight)
        self._scale: torch.Tensor | None = None

    @property
    def scale(self) -> torch.Tensor:
        """`1 + weight` in float32: [size]."""
        return 1.0 + self.weight.float() if self._scale is None else self._scale

    def finalize_weights(self) -> None:
        """Compute `1 + weight` once."""
        self._scale = 1.0 + self.weight.float()
