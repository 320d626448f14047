"""Soft limit on logits (https://arxiv.org/abs/2408.00118). Called by `layers.embedding.LMHead`."""

from __future__ import annotations

import torch

from tokenmill.ops import captured


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """`cap * tanh(x / cap)`: nearly x where it is small, never beyond the cap; of x's shape."""
    if x.is_meta:
        return captured.soft_cap(x, cap)
    return torch.tanh(x / cap) * cap
