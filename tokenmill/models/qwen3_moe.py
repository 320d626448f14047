"""Qwen 3 MoE (https://arxiv.org/abs/2505.09388): Qwen 3 with a mixture of experts in most or all of its layers."""

from __future__ import annotations

from tokenmill.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """Qwen 3's layers; `ModelConfig.moe` says which of them have experts."""


MODEL_CLASS = Qwen3MoeForCausalLM
