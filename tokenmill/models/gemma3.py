"""Gemma 3 (https://arxiv.org/abs/2503.19786), the language model: norms before and after attention and MLP, normalized
query and key heads, and a pattern of layers with a sliding window and layers that see everything, each with rotary
embeddings of their own. Serves `gemma3_text` and the language model inside `gemma3`; images are not read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.layers.attention import Attention
from tokenmill.layers.context import LayerContext
from tokenmill.layers.embedding import LMHead, VocabParallelEmbedding
from tokenmill.layers.forward_batch import ForwardBatch, wanted_rows
from tokenmill.layers.linear import QKVLinear, RowParallelLinear
from tokenmill.layers.mlp import GatedMLP
from tokenmill.layers.norm import GemmaRMSNorm
from tokenmill.layers.rope import RotaryEmbedding, Rotation
from tokenmill.models.base import CausalLM
from tokenmill.models.config import ModelConfig
from tokenmill.quantization.base import Rows


class Gemma3Attention(nn.Module):
    """Self-attention with normalized query and key heads; sliding or full by layer."""

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
        self.q_norm = GemmaRMSNorm(config.head_dim, config.rms_norm_eps, context)
        self.k_norm = GemmaRMSNorm(config.head_dim, config.rms_norm_eps, context)
        spec = AttentionSpec(
            num_heads=self.qkv_proj.num_heads,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.attention.scale,
            sliding_window=config.window_of(layer),
            soft_cap=config.attention.soft_cap,
        )
        self.attention = Attention(spec, context)
        self.num_rotated_heads = spec.num_heads + spec.num_kv_heads

    def forward(
        self,
        x: Rows,
        rotation: Rotation,
        metadata: AttentionMetadata,
        cache: LayerCache,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, hidden_size] to the rows at `wanted` [n, hidden_size]."""
        heads = self.qkv_proj(x)  # [T, H + 2 G, D]
        value = heads[:, self.num_rotated_heads :]
        query, key = rotation.normalize_and_apply(
            heads[:, : self.num_rotated_heads], self.qkv_proj.num_heads, self.q_norm, self.k_norm
        )
        attended = self.attention(query, key, value, metadata, cache)
        return self.o_proj(wanted_rows(attended, wanted))  # type: ignore[no-any-return]


class Gemma3DecoderLayer(nn.Module):
    """Attention and MLP, each between two norms and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, context: LayerContext) -> None:
        super().__init__()
        self.self_attn = Gemma3Attention(config, layer, context.child("self_attn"))
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            bias=config.mlp_bias,
            context=context.child("mlp"),
        )
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = GemmaRMSNorm(size, eps, context)
        self.post_attention_layernorm = GemmaRMSNorm(size, eps, context)
        self.pre_feedforward_layernorm = GemmaRMSNorm(size, eps, context)
        self.post_feedforward_layernorm = GemmaRMSNorm(size, eps, context)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: Rotation,
        metadata: AttentionMetadata,
        cache: LayerCache,
        wanted: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the MLP adds, residual stream) of the rows at `wanted` [n, hidden_size]; the next norm adds them."""
        rows, residual = self.input_layernorm.add_and_norm_for(self.self_attn.qkv_proj, x, residual)
        x = self.post_attention_layernorm(self.self_attn(rows, rotation, metadata, cache, wanted))
        rows, residual = self.pre_feedforward_layernorm.add_and_norm_for(self.mlp, x, wanted_rows(residual, wanted))
        return self.post_feedforward_layernorm(self.mlp(rows)), residual


class Gemma3Model(nn.Module):
    """Scaled embedding, decoder layers, final norm."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, context)
        # Rounded to the model's type, as the model was trained: sqrt(640) is 25.25 in bfloat16.
        self.embedding_scale = torch.tensor(config.hidden_size**0.5, dtype=context.dtype, device="cpu").item()
        self.layers = nn.ModuleList(
            Gemma3DecoderLayer(config, layer, context.child(f"layers.{layer}")) for layer in range(config.num_layers)
        )
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps, context)
        local_rope = config.local_rope if config.local_rope is not None else config.rope
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, context.device)
        self.local_rotary = RotaryEmbedding(local_rope, config.head_dim, context.device)
        self.is_local = [layer_type == "sliding_attention" for layer_type in config.layer_types]

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Normalized hidden states of the wanted tokens [n, hidden_size]."""
        x = self.embed_tokens(batch.input_ids) * self.embedding_scale
        residual: torch.Tensor | None = None
        full, local = self.rotary(batch.positions), self.local_rotary(batch.positions)
        for layer, cache, is_local in zip(self.layers, batch.caches, self.is_local, strict=True):
            wanted = batch.wanted if layer is self.layers[-1] else None
            x, residual = layer(x, residual, local if is_local else full, batch.attention, cache, wanted)
        return self.norm.add_and_norm(x, residual)[0]


class Gemma3ForCausalLM(CausalLM):
    """Gemma 3 with its output head."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        self.model = Gemma3Model(config, context.child("model"))
        self.lm_head = LMHead(
            config.vocab_size,
            config.hidden_size,
            tied_to=self.model.embed_tokens if config.tie_word_embeddings else None,
            context=context.child("lm_head"),
            soft_cap=config.final_logit_soft_cap,
        )

    @property
    def ignored_weights(self) -> Sequence[re.Pattern[str]]:
        """What a multimodal checkpoint holds besides the language model, too."""
        return [*super().ignored_weights, re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")]

    def rename_weight(self, name: str) -> str:
        """Multimodal checkpoints hold the language model under one of two prefixes, by the version that wrote them."""
        for prefix, own in (("language_model.model.", "model."), ("model.language_model.", "model.")):
            if name.startswith(prefix):
                return own + name.removeprefix(prefix)
        return name.removeprefix("language_model.")

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Hidden states of the wanted tokens after the final norm [n, hidden_size]; fills the caches."""
        return self.model(batch)  # type: ignore[no-any-return]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] to [n, vocab_size], of the model's type or float32."""
        return self.lm_head(hidden)  # type: ignore[no-any-return]


MODEL_CLASS = Gemma3ForCausalLM
