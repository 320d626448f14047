"""The draw of one token for each row of logits, with temperature, top-k, top-p and min-p. Called by `sampling.sampler`.

On a GPU one launch does it all; elsewhere the steps of `tokenmill.sampling` do.
"""

from __future__ import annotations

import torch


def can_sample(logits: torch.Tensor) -> bool:
    """Whether `sample_tokens` takes these logits."""
    return logits.is_cuda and logits.stride(-1) == 1


def sample_tokens(
    logits: torch.Tensor,
    greedy: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    stream_key: torch.Tensor,
) -> torch.Tensor:
    """One token for each row, whatever else is in the batch. Rows with NaN or +inf give any token.

    Args:
        logits: [R, V], of any float type, unit stride along V.
        greedy: [R] int64, what rows of temperature 0 take.
        slots: [R] int64, where each row's parameters are.
        positions: [R] int64, of the tokens in their sequences.
        temperature, top_p, min_p: [S] float64, columns of one table; top_p 1 and min_p 0 are off.
        top_k, stream_key: [S] int64, columns of one table; top_k 0 is off.

    Returns:
        [R] int64.
    """
    from tokenmill.ops.triton import sampling as kernels

    return kernels.sample_tokens(logits, greedy, slots, positions, temperature, top_k, top_p, min_p, stream_key)
