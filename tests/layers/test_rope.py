"""Frequencies against those of transformers, angles against the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.tiny_models import tiny_hf_config
from tokenmill.layers.rope import RotaryEmbedding, inverse_frequencies
from tokenmill.layers.rope_config import RopeConfig
from tokenmill.models.config import ModelConfig

CPU = torch.device("cpu")

PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn_options": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "attention_factor": 0.9,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
}


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS.keys())
@pytest.mark.parametrize("head_dim", [64, 128])
def test_same_frequencies_as_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf_config = tiny_hf_config(
        "llama", rope_parameters=dict(parameters), head_dim=head_dim, max_position_embeddings=131072
    )
    hf_rotary = LlamaRotaryEmbedding(hf_config)
    rope = ModelConfig.from_hf(hf_config.to_dict()).rope
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), hf_rotary.inv_freq, rtol=1e-6, atol=0.0)
    positions = torch.tensor([0, 1, 77, 4095])
    hf_cos, hf_sin = hf_rotary(torch.zeros(1), positions[None])
    rotation = RotaryEmbedding(rope, head_dim, CPU)(positions)
    torch.testing.assert_close(rotation.cos[:, 0], hf_cos[0], atol=1e-3, rtol=1e-3)
    half = head_dim // 2
    torch.testing.assert_close(rotation.signed_sin[:, 0, half:], hf_sin[0, :, half:], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(rotation.signed_sin[:, 0, :half], -hf_sin[0, :, :half], atol=1e-3, rtol=1e-3)


def test_frequency_factors_divide() -> None:
    plain = inverse_frequencies(RopeConfig(theta=10000.0), 8)
    factors = (1.0, 2.0, 4.0, 8.0)
    changed = inverse_frequencies(RopeConfig(theta=10000.0, frequency_factors=factors), 8)
    torch.testing.assert_close(changed * torch.tensor(factors), plain)


def test_llama3_factors_of_a_gguf_file_equal_the_formula() -> None:
    """GGUF files carry the result of the llama3 ramp as divisors instead of its parameters."""
    ramp = RopeConfig(theta=500000.0, type="llama3", factor=8.0, original_max_position_embeddings=8192)
    plain = inverse_frequencies(RopeConfig(theta=500000.0), 64)
    factors = tuple((plain / inverse_frequencies(ramp, 64)).tolist())
    by_factors = inverse_frequencies(RopeConfig(theta=500000.0, frequency_factors=factors), 64)
    torch.testing.assert_close(by_factors, inverse_frequencies(ramp, 64), rtol=1e-6, atol=0.0)


def test_rotated_scores_depend_on_the_distance_alone() -> None:
    rotary = RotaryEmbedding(RopeConfig(theta=10000.0), 16, CPU)
    query, key = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def score(query_position: int, key_position: int) -> float:
        turned_query = rotary(torch.tensor([query_position])).apply(query)
        turned_key = rotary(torch.tensor([key_position])).apply(key)
        return float((turned_query * turned_key).sum())

    assert score(107, 103) == pytest.approx(score(7, 3), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-4)
