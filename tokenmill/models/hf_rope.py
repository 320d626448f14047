"""Reads the rotary embedding from a Hugging Face configuration.

transformers 4 writes `rope_theta` and `rope_scaling` (and `rope_local_base_freq` for Gemma 3); transformers 5 writes
one `rope_parameters`, nested by layer type where layers differ. GGUF files add `rope_frequency_factors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, get_args

from tokenmill.errors import UnsupportedFeatureError, did_you_mean
from tokenmill.layers.rope_config import RopeConfig, RopeType
from tokenmill.models.hf_values import Values

_TYPES: Final[tuple[RopeType, ...]] = get_args(RopeType)


def read_rope(values: Values, head_dim: int, max_position_embeddings: int, *, layer_type: str) -> RopeConfig:
    """The rotary embedding of the layers of `layer_type`.

    Raises:
        CheckpointError: a key is missing or invalid.
        UnsupportedFeatureError: the type of scaling is not supported.
    """
    is_local = layer_type == "sliding_attention"
    theta_key = "rope_local_base_freq" if is_local else "rope_theta"
    parameters = values.nested("rope_parameters")
    if parameters is not None and isinstance(parameters.get("full_attention"), Mapping):
        parameters = parameters.nested(layer_type)
    elif is_local:  # without entries by layer type, scaling is for the layers with full attention only
        parameters = None
    elif parameters is None:
        parameters = values.nested("rope_scaling")
    factors = None if is_local else _frequency_factors(values, head_dim)
    if parameters is None:
        return RopeConfig(theta=values.number(theta_key), frequency_factors=factors)
    theta = parameters.number("rope_theta") if parameters.get("rope_theta") is not None else values.number(theta_key)
    rope_type = _rope_type(parameters)
    if rope_type == "default":
        return RopeConfig(theta=theta, frequency_factors=factors)
    if rope_type == "linear":
        factor = parameters.number("factor")
        return RopeConfig(theta=theta, type=rope_type, factor=factor, frequency_factors=factors)
    original = parameters.integer(
        "original_max_position_embeddings",
        default=values.optional_integer("original_max_position_embeddings") or max_position_embeddings,
    )
    if rope_type == "llama3":
        return RopeConfig(
            theta=theta,
            type=rope_type,
            factor=parameters.number("factor"),
            original_max_position_embeddings=original,
            low_freq_factor=parameters.number("low_freq_factor"),
            high_freq_factor=parameters.number("high_freq_factor"),
            frequency_factors=factors,
        )
    factor = parameters.number("factor", default=max_position_embeddings / original)
    return RopeConfig(
        theta=theta,
        type=rope_type,
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=parameters.number("beta_fast", default=32.0),
        beta_slow=parameters.number("beta_slow", default=1.0),
        truncate=parameters.flag("truncate", default=True),
        attention_factor=_yarn_attention_factor(parameters, factor),
        frequency_factors=factors,
    )


def _rope_type(parameters: Values) -> RopeType:
    """`rope_type`, or `type` as older files call it."""
    name = parameters.get("rope_type") or parameters.get("type") or "default"
    for known in _TYPES:
        if name == known:
            return known
    raise UnsupportedFeatureError(
        f"The rotary embedding type {name!r} is not supported.",
        field="model",
        remedy=did_you_mean(str(name), _TYPES),
    )


def _yarn_attention_factor(parameters: Values, factor: float) -> float:
    """Factor on cosine and sine: given, or from the stretching as the YaRN paper suggests."""
    given = parameters.optional_number("attention_factor")
    if given is not None:
        return given

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    scale, scale_all = parameters.optional_number("mscale"), parameters.optional_number("mscale_all_dim")
    if scale is not None and scale_all is not None:
        return magnitude(scale) / magnitude(scale_all)
    return magnitude(1.0)


def _frequency_factors(values: Values, head_dim: int) -> tuple[float, ...] | None:
    """`rope_frequency_factors`: a list, or an object with the list under `factors`."""
    given = values.get("rope_frequency_factors")
    if isinstance(given, Mapping):
        given = given.get("factors")
    if given is None:
        return None
    expected = f"{head_dim // 2} positive numbers"
    if not isinstance(given, list | tuple) or len(given) != head_dim // 2:
        raise values.invalid("rope_frequency_factors", expected)
    if not all(isinstance(factor, int | float) and 0 < factor < math.inf for factor in given):
        raise values.invalid("rope_frequency_factors", expected)
    return tuple(float(factor) for factor in given)
