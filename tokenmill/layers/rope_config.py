"""`RopeConfig`: which rotary embedding a model uses. Plain data without torch; `layers.rope` computes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

RopeType: TypeAlias = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding and how it is stretched beyond the context of the pre-training.

    Args:
        theta: base of the wavelengths.
        type: how frequencies are changed: `default` (not at all), `linear` (all divided by `factor`), `llama3` (low
            ones divided by `factor`, with a ramp), `yarn` (https://arxiv.org/abs/2309.00071).
        factor: how many times longer the context became.
        original_max_position_embeddings: context of the pre-training; `llama3` and `yarn` need it.
        low_freq_factor, high_freq_factor: ends of the ramp of `llama3`, in periods per original context.
        beta_fast, beta_slow: ends of the ramp of `yarn`, in periods per original context.
        truncate: whether `yarn` rounds the ends of its ramp to whole dimensions.
        attention_factor: factor on cosine and sine.
        frequency_factors: divisors of the frequencies, one for each pair of dimensions, as GGUF files carry them.
    """

    theta: float
    type: RopeType = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    frequency_factors: tuple[float, ...] | None = None
