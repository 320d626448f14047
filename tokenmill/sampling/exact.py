"""Exact arithmetic on probabilities: integer weights, and thresholds found by counting digits instead of sorting.

Floating-point sums depend on the order of summation, and that depends on the shape of the batch. Integer sums do not.
So probabilities become 64-bit integers before anything is summed: a row then gives the same answer alone, in a batch,
on a CPU and on a GPU. Called by `steps` (top-k, top-p) and `random` (the draw).
"""

from __future__ import annotations

import torch

MAX_ELEMENTS = 1 << 25
"""Most logits (rows x vocabulary) worked on at once on a GPU: all temporary tensors then take about 1 GB."""
_MAX_ELEMENTS_PER_THREAD = 1 << 16
"""Likewise on a CPU, for each thread: temporary tensors then stay in its cache."""

_MIN_LOGIT = -60.0
"""e**-60 is far below the smallest unit of integer weights. (CPUs are slow at exp(-inf) and at denormal numbers.)"""

_SIGN_BIT = -(2**31)
_DIGITS = ((21, 11), (10, 11), (0, 10))
"""(shift, width in bits) of the three digits of a 32-bit key, the highest first."""


def integer_weights(
    logits: torch.Tensor,  # [R, V] float32
) -> tuple[torch.Tensor, torch.Tensor]:  # [R, V] float32, [R, V] int64
    """Weights `exp(logit - row maximum)`, from e**-60 to 1, and the same in units of 2**-k, rounded down.

    k is the largest number for which a row's sum stays below 2**62 (46 for 49152 tokens, 43 for 262144): rounding moves
    less than 2**-27 of the probability of any row. A row whose logits are all -inf has only zeros. Logits must not be
    NaN or +inf.
    """
    row_max = logits.amax(dim=-1, keepdim=True)
    row_max = row_max.masked_fill(row_max.isneginf(), 0.0)
    weights = (logits - row_max).clamp_(min=_MIN_LOGIT).exp_()
    num_bits = 62 - logits.shape[-1].bit_length()
    return weights, (weights * float(2**num_bits)).to(torch.int64)


def ordered_bits(values: torch.Tensor) -> torch.Tensor:
    """Bit patterns of float32 `values` as int32 in the same order; `float_from_ordered_bits` turns them back.

    A float's bits without the sign are ordered like its magnitude (IEEE 754), so negative numbers only need their
    magnitude bits inverted. -0.0 comes right before +0.0.
    """
    bits = values.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def float_from_ordered_bits(keys: torch.Tensor) -> torch.Tensor:
    """Inverse of `ordered_bits`."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)


def largest_threshold(
    keys: torch.Tensor,  # [R, V] int32
    measure: torch.Tensor,  # [R, V] int64, not negative
    target: torch.Tensor,  # [R] int64, from 1 to the row's total measure
) -> torch.Tensor:  # [R] int32
    """The largest t of each row for which the measure of `keys >= t` is at least `target`. Exact.

    With measure 1 this is the `target`-th largest key; with probabilities it is where the nucleus ends. A radix
    selection: three histograms of 11, 11 and 10 bits narrow t down from its highest digit, where a bisection would pass
    over the row 32 times. Integer additions commute, so the atomic ones of a GPU give the same result each time.
    """
    remaining = target.unsqueeze(1)
    keys = keys ^ _SIGN_BIT  # digits then count up from the most negative key
    threshold = torch.zeros_like(remaining, dtype=torch.int32)  # its digits so far, zeros below
    for shift, width in _DIGITS:
        counted, above = measure, shift + width
        if above < 32:  # only the keys that agree with the threshold so far
            counted = measure * ((keys >> above) == (threshold >> above))
        digit = ((keys >> shift) & ((1 << width) - 1)).to(torch.int64)
        histogram = torch.zeros(keys.shape[0], 1 << width, dtype=torch.int64, device=keys.device)
        histogram.scatter_add_(1, digit, counted)
        at_least = histogram.flip(-1).cumsum(-1).flip(-1)  # measure of the bin and those above it
        chosen = ((at_least >= remaining).sum(-1, keepdim=True) - 1).clamp_(min=0)
        remaining = remaining - (at_least - histogram).gather(1, chosen)
        threshold = threshold | (chosen.to(torch.int32) << shift)
    return (threshold ^ _SIGN_BIT).squeeze(1)


def rows_where(mask: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[num_rows] int64: the rows where `mask` [R] is True, in order.

    `num_rows` is what the host knows the count to be, so that nothing waits for the device as `nonzero` would.
    """
    return torch.argsort(mask.to(torch.int8), descending=True, stable=True)[:num_rows]


def rows_per_slice(logits: torch.Tensor) -> int:
    """Rows of `logits` [R, V] to work on at once."""
    num_elements = MAX_ELEMENTS if logits.is_cuda else _MAX_ELEMENTS_PER_THREAD * torch.get_num_threads()
    return max(1, num_elements // logits.shape[1])
