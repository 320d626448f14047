"""Random numbers as a function of (seed, sequence, position), and the draw of a token. No state, nothing shared.

A request's numbers depend on nothing else in the batch, and are the same after a preemption and on every device. The
generator is SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014, with the
constants of Stafford's variant 13), used as a counter-based generator. Called by `slot_params` and `sampler`.
"""

from __future__ import annotations

import torch

from tokenmill.sampling.exact import integer_weights

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def stream_key(seed: int, sequence_index: int) -> int:
    """Key of one sequence's stream of random numbers, as a signed 64-bit integer.

    Args:
        seed: any integer; it counts modulo 2**64.
        sequence_index: which of the request's sequences, 0 or more.
    """
    return _signed(_mix(_mix(seed + _GAMMA) + (sequence_index + 1) * _GAMMA))


def uniforms(
    keys: torch.Tensor,  # [R] int64, from `stream_key`
    positions: torch.Tensor,  # [R] int
) -> torch.Tensor:  # [R] float64
    """One number from [0, 1) for each row, with 53 random bits."""
    # Products and sums of int64 tensors wrap around modulo 2**64, as the generator wants.
    bits = keys + (positions.to(torch.int64) + 1) * _signed(_GAMMA)
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_MIX_1)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_MIX_2)
    bits = bits ^ _shift_right(bits, 31)
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def draw(
    logits: torch.Tensor,  # [R, V] float32, neither NaN nor +inf
    uniform: torch.Tensor,  # [R] float64 in [0, 1)
) -> torch.Tensor:  # [R] int64
    """Draw a token from softmax(logits) by inverting its cumulative distribution at `uniform`.

    The distribution function is summed in integers, so a token is drawn exactly as often as its weight says, wherever
    it stands in the vocabulary, and one of weight zero never. Rows that are all -inf give token 0.
    """
    cumulative = integer_weights(logits)[1].cumsum(dim=-1)  # [R, V]
    total = cumulative[:, -1]
    # `uniform` below 1 times a total near 2**62 can round up to the total itself; hence the minimum.
    target = torch.minimum((uniform * total).to(torch.int64), total - 1)
    return torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)


def _shift_right(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Shift as unsigned; `>>` on a signed tensor would repeat the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: int) -> int:
    bits &= _MASK
    bits = ((bits ^ (bits >> 30)) * _MIX_1) & _MASK
    bits = ((bits ^ (bits >> 27)) * _MIX_2) & _MASK
    return bits ^ (bits >> 31)


def _signed(bits: int) -> int:
    bits &= _MASK
    return bits - (1 << 64) if bits >> 63 else bits
