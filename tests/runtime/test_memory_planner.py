"""`plan_memory` against a constructed model's real bytes, and its answers when memory is short."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.tiny_models import build_model, parameter_count, tiny_hf_model
from tokenmill.config import KvCacheConfig
from tokenmill.errors import OutOfMemoryError
from tokenmill.kv_cache.tensors import allocate_caches
from tokenmill.models import ModelConfig
from tokenmill.runtime.memory_planner import MeasuredMemory, MemoryRequest, plan_memory

pytestmark = pytest.mark.spec("C3")
GIB = 2**30


def llama_8b() -> ModelConfig:
    return ModelConfig.from_hf({
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "hidden_act": "silu",
    })  # fmt: skip


def request(**changes: object) -> MemoryRequest:
    values = {"weight_bytes": 2, "cache_bytes": 2, "max_batch_size": 64, "max_num_tokens": 2048, "max_seq_len": 8192}
    return MemoryRequest(**{**values, "is_cpu": False, **changes})  # type: ignore[arg-type]


def test_weights_and_cache_are_the_bytes_of_real_tensors() -> None:
    hf_model = tiny_hf_model("llama", tie_word_embeddings=False)
    model = build_model(hf_model.config.to_dict(), hf_model.state_dict())
    plan = plan_memory(model.config, request(weight_bytes=4, cache_bytes=4), KvCacheConfig(max_tokens=100), None)
    assert plan.weights == 4 * sum(parameter.numel() for parameter in hf_model.parameters())
    assert parameter_count(model) <= plan.weights // 4
    config = model.config
    caches = allocate_caches(
        config.num_layers, plan.num_blocks, plan.tokens_per_block, config.num_key_value_heads, config.head_dim,
        torch.float32, torch.device("cpu"),
    )  # fmt: skip
    assert plan.kv_cache == sum(cache.nbytes for layer in caches for cache in layer)
    assert plan.cache_tokens == 128  # 100 rounded up to blocks of 32; block 0 is beside them


def test_llama_8b_on_an_80_gib_gpu() -> None:
    plan = plan_memory(llama_8b(), request(), KvCacheConfig(), 79 * GIB)
    assert plan.weights == 2 * 8_030_261_248  # the published number of parameters
    assert plan.kv_bytes_per_token == 131072
    assert 0.85 * 79 * GIB < plan.total <= 79 * GIB
    assert plan.cache_tokens > 400_000


def test_graphs_are_planned_for_with_the_largest_step_that_is_captured() -> None:
    """They hold the tensors of one step in memory of their own, whatever the size of steps that are not captured."""
    plans = [
        plan_memory(llama_8b(), request(max_num_tokens=num_tokens), KvCacheConfig(), 79 * GIB)
        for num_tokens in (1024, 8192, 65536)
    ]
    gate_up = 8192 * 2 * 14336 * 2
    assert plans[0].graphs < gate_up < plans[1].graphs == plans[2].graphs
    assert all(plan.total <= 79 * GIB for plan in plans)
    assert plan_memory(llama_8b(), request(is_cpu=True), KvCacheConfig(), 79 * GIB).graphs == 0
    measured = MeasuredMemory(weights=16 * GIB, activations=GIB, graphs=3 * GIB)
    plan = plan_memory(llama_8b(), request(), KvCacheConfig(), 79 * GIB, measured)
    assert plan.graphs == 3 * GIB
    without = plan_memory(llama_8b(), request(), KvCacheConfig(), 79 * GIB, replace(measured, graphs=0))
    assert 2.5 * GIB < without.kv_cache - plan.kv_cache <= 3 * GIB, "the cache gives way to them"


def test_a_cpu_keeps_most_memory_for_others_and_no_more_than_can_be_used() -> None:
    plan = plan_memory(llama_8b(), request(is_cpu=True), KvCacheConfig(), 64 * GIB)
    assert plan.kv_cache <= 0.25 * (64 * GIB - plan.weights)
    small = plan_memory(llama_8b(), request(is_cpu=True, max_batch_size=2, max_seq_len=1024), KvCacheConfig(), 64 * GIB)
    assert small.cache_tokens == 2 * 1024


@pytest.mark.parametrize(
    ("free", "config"),
    [(8 * GIB, KvCacheConfig()), (20 * GIB, KvCacheConfig(max_tokens=100_000))],
    ids=["weights", "cache"],
)
def test_what_cannot_fit_is_refused_with_the_numbers(free: int, config: KvCacheConfig) -> None:
    with pytest.raises(OutOfMemoryError, match=r"GiB are free.*max_tokens") as caught:
        plan_memory(llama_8b(), request(), config, free)
    assert caught.value.field == "kv_cache_config"
