"""`RotaryEmbedding`: the cosines and sines of a step's positions, computed once and used by every layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from tokenmill.layers.rope_config import RopeConfig
from tokenmill.ops import captured
from tokenmill.ops.head_norm import HeadNorm, norm_and_rope
from tokenmill.ops.rope import apply_rope, rotation


class Rotation(NamedTuple):
    """The angles of T tokens, as `ops.rope.apply_rope` takes them: [T, 1, D] float32 each."""

    cos: torch.Tensor
    signed_sin: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Turn all heads of x [T, heads, D]."""
        return apply_rope(x, self.cos, self.signed_sin)

    def apply_to_heads(
        self, heads: torch.Tensor, num_query_heads: int, norm: HeadNorm | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalize, if there is a norm, then turn heads [T, H + G, D]: query [T, H, D] and key [T, G, D]."""
        if norm is not None:
            return norm_and_rope(heads, num_query_heads, norm, self.cos, self.signed_sin)
        turned = self.apply(heads)
        return turned[:, :num_query_heads], turned[:, num_query_heads:]


class RotaryEmbedding:
    """Angles of positions. Nothing is tabulated, so there is no longest position.

    Args:
        config: wavelengths and their stretching.
        head_dim: D.
        device: of the positions.
    """

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        frequencies = inverse_frequencies(config, head_dim)
        self._captured_frequencies = frequencies.tolist() if device.type == "meta" else []
        self._frequencies = frequencies.to(device)
        self._factor = config.attention_factor

    def __call__(self, positions: torch.Tensor) -> Rotation:
        """Angles of positions [T] int64."""
        if positions.is_meta:
            return Rotation(*captured.rotation(positions, self._captured_frequencies, self._factor))
        return Rotation(*rotation(positions, self._frequencies, self._factor))


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions: [head_dim / 2] float32, on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequencies = 1.0 / config.theta**exponents
    if config.type == "linear":
        frequencies = frequencies / config.factor
    elif config.type == "llama3":
        frequencies = _llama3(frequencies, config)
    elif config.type == "yarn":
        frequencies = _yarn(frequencies, config, head_dim)
    if config.frequency_factors is not None:
        frequencies = frequencies / torch.tensor(config.frequency_factors, dtype=torch.float32, device="cpu")
    return frequencies


def _llama3(frequencies: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Divide low frequencies by the factor, keep high ones, and blend between (Llama 3.1)."""
    assert config.original_max_position_embeddings is not None
    periods = config.original_max_position_embeddings * frequencies / (2.0 * math.pi)
    ramp = (periods - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    keep = ramp.clamp(0.0, 1.0)
    return (1.0 - keep) * frequencies / config.factor + keep * frequencies


def _yarn(frequencies: torch.Tensor, config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Divide by the factor from the dimension with `beta_slow` periods on, keep up to `beta_fast`, blend between."""
    assert config.original_max_position_embeddings is not None
    context = config.original_max_position_embeddings

    def dimension_of(num_periods: float) -> float:
        return head_dim * math.log(context / (num_periods * 2.0 * math.pi)) / (2.0 * math.log(config.theta))

    first, last = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    dimensions = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    stretch = ((dimensions - first) / (last - first)).clamp(0.0, 1.0)
    return frequencies / config.factor * stretch + frequencies * (1.0 - stretch)
