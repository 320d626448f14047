"""Gemma 3 (https://arxiv.org/abs/2503.19786), the language model: norms before and after attention and MLP, normalized
query and key heads, and a pattern of layers with a sliding window and layers that see everything, each with rotary
embeddings of their own. Serves `gemma3_text` and the language model inside `gemma3`; images are not read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

from tokenmill.attention.base import AttentionMetadata, LayerCache
from tokenmill.layers.context import LayerContext
from tokenmill.layers.embedding import LMHead, VocabParallelEmbedding
from tokenmill.layers.forward_batch import ForwardBatch, wanted_rows
from tokenmill.layers.mlp import GatedMLP
from tokenmill.layers.norm import GemmaRMSNorm
from tokenmill.layers.rope import RotaryEmbedding, Rotation
from tokenmill.models.base import CausalLM
from tokenmill.models.config import ModelConfig
from tokenmill.models.qwen3 import Qwen3Attention


class Gemma3Attention(Qwen3Attention):
    """Self-attention with normalized query and key heads, as Qwen 3's; sliding or full by layer."""

    norm_class = GemmaRMSNorm


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
