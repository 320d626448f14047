"""Qwen 2 and 2.5 (https://arxiv.org/abs/2407.10671): Llama with a bias on the query, key and value projections."""

from __future__ import annotations

from tokenmill.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Llama's layers; `ModelConfig.attention` adds the biases, `layer_types` the windows of later layers."""


MODEL_CLASS = Qwen2ForCausalLM
