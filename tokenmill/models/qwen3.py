"""Qwen 3 (https://arxiv.org/abs/2505.09388): Llama with a norm on every query and key head, no bias by default."""

from __future__ import annotations

from typing import ClassVar

from tokenmill.layers.context import LayerContext
from tokenmill.layers.norm import RMSNorm
from tokenmill.models.config import ModelConfig
from tokenmill.models.llama import LlamaAttention, LlamaForCausalLM


class Qwen3Attention(LlamaAttention):
    """Self-attention with normalized query and key heads and rotary positions.

    Attributes:
        norm_class: the norm of the heads.
    """

    norm_class: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, config: ModelConfig, layer: int, context: LayerContext) -> None:
        super().__init__(config, layer, context)
        self.q_norm = self.norm_class(config.head_dim, config.rms_norm_eps, context)
        self.k_norm = self.norm_class(config.head_dim, config.rms_norm_eps, context)

    @property
    def head_norms(self) -> tuple[RMSNorm, RMSNorm]:
        """Norms of query and of key heads."""
        return self.q_norm, self.k_norm


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Llama's layers with Qwen 3's attention."""

    attention_class = Qwen3Attention


MODEL_CLASS = Qwen3ForCausalLM
