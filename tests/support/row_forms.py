"""Layers that are given plain rows where they would rather have quantized ones."""

from __future__ import annotations

import pytest
import torch

from tokenmill.layers.linear import LinearBase
from tokenmill.quantization.base import RowForm


def give_no_quantized_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers quantize their rows themselves; other forms are given as before."""
    row_form = LinearBase.row_form

    def without_quantized(layer: LinearBase, x: torch.Tensor) -> RowForm:
        form = row_form(layer, x)
        return RowForm.PLAIN if form is RowForm.QUANTIZED else form

    monkeypatch.setattr(LinearBase, "row_form", without_quantized)
