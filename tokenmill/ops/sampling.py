"""The draw of one token for each row of logits, with temperature, top-k, top-p and min-p. Called by `sampling.sampler`.

On a GPU one launch does it all; elsewhere the steps of `tokenmill.sampling` do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class SlotColumns(NamedTuple):
    """Parameters of the slots [S], columns of two tables: one of the float64, one of the int64.

    Args:
        temperature: float64; 0: the most likely token.
        top_k: int64; 0: off.
        top_p: float64; 1: off.
        min_p: float64; 0: off.
        stream_key: int64, of the slot's random numbers.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    stream_key: torch.Tensor


def can_sample(logits: torch.Tensor) -> bool:
    """Whether `sample_tokens` takes these logits."""
    return logits.is_cuda and logits.stride(-1) == 1


def sample_tokens(
    logits: torch.Tensor, greedy: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, columns: SlotColumns
) -> torch.Tensor:
    """One token for each row, whatever else is in the batch. Rows with NaN or +inf give any token.

    Args:
        logits: [R, V], of any float type, unit stride along V.
        greedy: [R] int64, what rows of temperature 0 take.
        slots: [R] int64, where each row's parameters are.
        positions: [R] int64, of the tokens in their sequences.
        columns: the parameters.

    Returns:
        [R] int64.
    """
    from tokenmill.ops.triton import sampling as kernels

    return kernels.sample_tokens(logits, greedy, slots, positions, columns)
