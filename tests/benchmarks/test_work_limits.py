"""`benchmarks.gpu.work_limits`: the scheduler's steps, and the seconds of their bytes and products."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.gpu.work_limits import Rates, Total, count
from tokenmill.models.config import ModelConfig

HIDDEN, INNER, LAYERS, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 3, 128, 4, 2, 16
CONFIG = ModelConfig.from_hf({
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "head_dim": HEAD_DIM,
    "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "hidden_act": "silu",
    "tie_word_embeddings": False,
})  # fmt: skip
LAYER_WEIGHTS = HIDDEN * HEAD_DIM * (HEADS + 2 * KV_HEADS) + HIDDEN * HEADS * HEAD_DIM + 3 * HIDDEN * INNER


def totals(work: str, *, bandwidth: float, flops: float, cache_tokens: int = 4096) -> dict[str, Total]:
    rates = Rates(bandwidth, flops, flops, cache_nbytes=2, linear_nbytes=2.0)
    options = argparse.Namespace(max_batch_size=64, max_num_tokens=256, cache_tokens=cache_tokens)
    return dict(count(CONFIG, rates, work, options))


def test_a_slow_memory_bounds_every_step_by_weights_and_cache() -> None:
    """Five prompts of 40 tokens in one step, then two steps of decoding that read 41 and 42 keys of each sequence."""
    found = totals("40/3/5", bandwidth=1e6, flops=1e30)
    weights = 2 * (LAYERS * LAYER_WEIGHTS + VOCAB * HIDDEN)
    token = 2 * 2 * KV_HEADS * HEAD_DIM * LAYERS
    assert {kind: total.num_steps for kind, total in found.items()} == {"with prompts": 1, "decode": 2}
    assert found["with prompts"].in_turn == pytest.approx(weights / 1e6)
    assert found["decode"].in_turn == pytest.approx((2 * weights + 5 * (41 + 42) * token) / 1e6)
    assert found["decode"].overlapped == pytest.approx(found["decode"].in_turn)


def test_slow_arithmetic_bounds_every_step_by_products_and_attention() -> None:
    found = totals("40/3/5", bandwidth=1e30, flops=1e9)
    pair = 4 * HEADS * HEAD_DIM * LAYERS
    head = 2 * VOCAB * HIDDEN * 5
    behind = HIDDEN * HEADS * HEAD_DIM + 3 * HIDDEN * INNER  # the last layer's attention: five tokens are wanted
    prompts = 2 * (LAYERS * LAYER_WEIGHTS * 200 - behind * 195) + head + pair * 5 * (40 * 41 // 2)
    assert found["with prompts"].in_turn == pytest.approx(prompts / 1e9)
    decode = 2 * (2 * LAYERS * LAYER_WEIGHTS * 5 + head) + pair * 5 * (41 + 42)
    assert found["decode"].in_turn == pytest.approx(decode / 1e9)


def test_operations_in_turn_take_at_least_as_long_as_overlapped_ones() -> None:
    found = totals("40/3/5", bandwidth=1e9, flops=3e9)
    assert any(total.in_turn > 1.05 * total.overlapped for total in found.values())
    assert all(total.in_turn >= total.overlapped for total in found.values())


def test_a_small_cache_makes_waves() -> None:
    """Four blocks of 32 tokens hold two sequences of 42: five requests decode in three waves of two steps."""
    assert totals("40/3/5", bandwidth=1.0, flops=1.0, cache_tokens=128)["decode"].num_steps == 6
