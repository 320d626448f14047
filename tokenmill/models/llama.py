"""Llama (https://arxiv.org/abs/2302.13971, https://arxiv.org/abs/2407.21783) and models of its shape, such as SmolLM2.

Biases and sliding windows come from the configuration, so that `mistral` and `qwen2` are this model with other numbers;
`qwen3` brings attention of its own. Module names are those of Hugging Face; query, key and value, and gate and up
projections are merged.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.layers.attention import Attention
from tokenmill.layers.context import LayerContext
from tokenmill.layers.embedding import LMHead, VocabParallelEmbedding
from tokenmill.layers.forward_batch import ForwardBatch, wanted_rows
from tokenmill.layers.linear import QKVLinear, RowParallelLinear
from tokenmill.layers.norm import RMSNorm
from tokenmill.layers.rope import RotaryEmbedding, Rotation
from tokenmill.models.base import CausalLM
from tokenmill.models.config import ModelConfig
from tokenmill.models.feed_forward import feed_forward
from tokenmill.quantization.base import Added, RowForm, Rows


class LlamaAttention(nn.Module):
    """Self-attention with grouped key/value heads and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int, context: LayerContext) -> None:
        super().__init__()
        self.qkv_proj = QKVLinear(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            bias=config.attention.qkv_bias,
            context=context.child("qkv_proj"),
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=config.attention.output_bias,
            context=context.child("o_proj"),
        )
        spec = AttentionSpec(
            num_heads=self.qkv_proj.num_heads,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.attention.scale,
            sliding_window=config.window_of(layer),
            soft_cap=config.attention.soft_cap,
        )
        self.attention = Attention(spec, context)

    def forward(
        self,
        x: Rows,
        rotation: Rotation,
        metadata: AttentionMetadata,
        cache: LayerCache,
        wanted: torch.Tensor | None = None,
        add_to: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, hidden_size] to the rows at `wanted` [n, hidden_size]; `add_to`: see `RowParallelLinear`."""
        qkv = self.qkv_proj(x)
        form = self.o_proj.row_form(qkv) if wanted is None else RowForm.PLAIN
        rows = self.attention.prepare_and_attend(qkv, rotation, metadata, cache, norms=self.head_norms, form=form)
        if wanted is not None:
            assert isinstance(rows, torch.Tensor), "plain rows were asked for"
            rows = wanted_rows(rows, wanted)
        return self.o_proj(rows, add_to)  # type: ignore[no-any-return]

    @property
    def head_norms(self) -> tuple[RMSNorm, RMSNorm] | None:
        """Norms of query and of key heads."""
        return None


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP (or experts), each behind a norm and added to the residual stream."""

    def __init__(
        self, config: ModelConfig, layer: int, context: LayerContext, attention_class: type[LlamaAttention]
    ) -> None:
        super().__init__()
        self.self_attn = attention_class(config, layer, context.child("self_attn"))
        self.mlp = feed_forward(config, layer, context.child("mlp"))
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)

    def forward(
        self,
        x: Added,
        residual: torch.Tensor | None,
        rotation: Rotation,
        metadata: AttentionMetadata,
        cache: LayerCache,
        wanted: torch.Tensor | None = None,
    ) -> tuple[Added, torch.Tensor]:
        """(what the MLP adds, residual stream) of the rows at `wanted` [n, hidden_size]; the next norm adds them.

        Where products are added in passing both are the stream.
        """
        rows, residual = self.input_layernorm.add_and_norm_for(self.self_attn.qkv_proj, x, residual)
        residual = wanted_rows(residual, wanted)
        x = self.self_attn(rows, rotation, metadata, cache, wanted, add_to=residual)
        rows, residual = self.post_attention_layernorm.add_and_norm_for(self.mlp, x, residual)
        return self.mlp(rows, add_to=residual), residual


class LlamaModel(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: ModelConfig, context: LayerContext, attention_class: type[LlamaAttention]) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, context)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config, layer, context.child(f"layers.{layer}"), attention_class)
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, context.device)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Normalized hidden states of the wanted tokens [n, hidden_size]."""
        x = self.embed_tokens(batch.input_ids)
        residual: torch.Tensor | None = None
        rotation = self.rotary(batch.positions)
        for layer, cache in zip(self.layers, batch.caches, strict=True):
            wanted = batch.wanted if layer is self.layers[-1] else None
            x, residual = layer(x, residual, rotation, batch.attention, cache, wanted)
        return self.norm.add_and_norm(x, residual)[0]


class LlamaForCausalLM(CausalLM):
    """Llama with its output head.

    Attributes:
        attention_class: self-attention of every layer.
    """

    attention_class: ClassVar[type[LlamaAttention]] = LlamaAttention

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        self.model = LlamaModel(config, context.child("model"), self.attention_class)
        self.lm_head = LMHead(
            config.vocab_size,
            config.hidden_size,
            tied_to=self.model.embed_tokens if config.tie_word_embeddings else None,
            context=context.child("lm_head"),
        )

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Hidden states of the wanted tokens after the final norm [n, hidden_size]; fills the caches."""
        return self.model(batch)  # type: ignore[no-any-return]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] to [n, vocab_size], of the model's type or float32."""
        return self.lm_head(hidden)  # type: ignore[no-any-return]


MODEL_CLASS = LlamaForCausalLM
