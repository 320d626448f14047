"""Every architecture, tiny and random, against the logits of transformers in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.tiny_models import (
    TINY_MOE,
    all_logits,
    build_model,
    random_tokens,
    relative_error,
    sequences_for,
    tiny_hf_model,
)

TOLERANCE = 1e-4

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_all_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_multi_head": ("llama", {"num_key_value_heads": 6}),
    "llama_llama3_rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama_yarn_rope": ("llama", {"rope_parameters": YARN_ROPE}),
    "llama_yarn_mscale": ("llama", {"rope_parameters": {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.7}}),
    "llama_linear_rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_sliding": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2_tied_sliding": ("qwen2", {"tie_word_embeddings": True, **WINDOWED}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3_tied_bias": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe_some_layers": (
        "qwen3_moe",
        {"decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [3], "attention_bias": True},
    ),
    "qwen3_moe_sliding": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 7, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {}),
    "mixtral_sliding": ("mixtral", {"sliding_window": 7, "num_experts_per_tok": 5}),
    "gemma3": ("gemma3_text", {"sliding_window": 7, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
    "gemma3_untied_scaled": (
        "gemma3_text",
        {
            "tie_word_embeddings": False,
            "sliding_window": 5,
            "rope_parameters": GEMMA3_ROPE,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3_soft_capped_logits": ("gemma3_text", {"final_logit_softcapping": 5.0, "attention_bias": True}),
}
COMPILED_CASES = {name: case for name, case in CASES.items() if case[0] not in TINY_MOE}
"""Those with one MLP in each layer."""


@pytest.fixture(scope="module", params=CASES)
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """(transformers model, tokenmill model) with the same weights."""
    model_type, changes = CASES[request.param]
    hf_model = tiny_hf_model(model_type, **changes)
    return hf_model, build_model(hf_model.config.to_dict(), hf_model.state_dict())


@torch.no_grad()
def hf_logits(hf_model: Any, token_ids: list[int]) -> torch.Tensor:
    """[T, vocab_size] of one sequence computed in one piece."""
    logits: torch.Tensor = hf_model(torch.tensor([token_ids])).logits[0]
    return logits


def test_whole_prefill(models: tuple[Any, Any]) -> None:
    hf_model, model = models
    token_ids = random_tokens(50)
    actual = all_logits(model, sequences_for(model), [("a", token_ids)])
    assert relative_error(actual, hf_logits(hf_model, token_ids)) < TOLERANCE


def test_hidden_states_of_some_tokens_alone(models: tuple[Any, Any]) -> None:
    """The last layer leaves the others out; what the wanted ones attend to is complete."""
    _, model = models
    rows = [("a", random_tokens(1)), ("b", random_tokens(17, seed=1)), ("c", random_tokens(9, seed=2))]
    wanted = torch.tensor([26, 0, 17, 3, 3])
    with torch.no_grad():
        expected = model(sequences_for(model).batch(rows))[wanted]
        actual = model(replace(sequences_for(model).batch(rows), wanted=wanted))
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < TOLERANCE


def test_chunked_prefill_then_decode(models: tuple[Any, Any]) -> None:
    hf_model, model = models
    token_ids = random_tokens(41, seed=1)
    sequences = sequences_for(model, tokens_per_block=8)
    chunks = [token_ids[:13], token_ids[13:14], token_ids[14:37], *[[token] for token in token_ids[37:]]]
    actual = torch.cat([all_logits(model, sequences, [("a", chunk)]) for chunk in chunks])
    assert relative_error(actual, hf_logits(hf_model, token_ids)) < TOLERANCE


def test_decode_and_prefill_rows_together(models: tuple[Any, Any]) -> None:
    hf_model, model = models
    prompts = {name: random_tokens(count, seed=count) for name, count in (("a", 30), ("b", 5), ("c", 24), ("d", 12))}
    sequences = sequences_for(model, tokens_per_block=4)
    steps: list[list[tuple[str, list[int]]]] = [
        [("a", prompts["a"][:28]), ("b", prompts["b"][:4])],
        [("b", prompts["b"][4:]), ("a", prompts["a"][28:29]), ("c", prompts["c"][:9]), ("d", prompts["d"])],
        [("a", prompts["a"][29:]), ("c", prompts["c"][9:])],
    ]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in prompts}
    for rows in steps:
        logits = all_logits(model, sequences, rows).split([len(token_ids) for _, token_ids in rows])
        for (name, _), row_logits in zip(rows, logits, strict=True):
            found[name].append(row_logits)
    for name, token_ids in prompts.items():
        assert relative_error(torch.cat(found[name]), hf_logits(hf_model, token_ids)) < TOLERANCE
