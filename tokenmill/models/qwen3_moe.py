"""Qwen 3 MoE (https://arxiv.org/abs/2505.09388): Qwen 3 with a mixture of experts in most or all of its layers."""

from __future__ import annotations

from tokenmill.models.llama import LlamaForCausalLM
from tokenmill.models.qwen3 import Qwen3Attention


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    """Llama's layers with Qwen 3's attention; `ModelConfig.moe` says which of them have experts."""

    attention_class = Qwen3Attention


MODEL_CLASS = Qwen3MoeForCausalLM
