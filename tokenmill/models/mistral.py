"""Mistral (https://arxiv.org/abs/2310.06825): Llama with a sliding window, if the configuration sets one."""

from __future__ import annotations

from tokenmill.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """Llama's layers; `ModelConfig.layer_types` makes every layer slide or none."""


MODEL_CLASS = MistralForCausalLM
