"""`CausalLM`: what every model is to the loader and the runner."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from tokenmill.layers.context import LayerContext
from tokenmill.layers.forward_batch import ForwardBatch
from tokenmill.layers.moe import names_of_stack
from tokenmill.models.config import ModelConfig


class CausalLM(nn.Module, ABC):
    """A decoder-only language model. Subclasses hold the layers under Hugging Face's module names.

    Args:
        config: the architecture's numbers.
        context: how layers are built.
    """

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        self.config = config
        self._expert_parallel = context.expert_parallel

    @property
    def ignored_weights(self) -> Sequence[re.Pattern[str]]:
        """Full-match patterns of checkpoint tensors that the model does not need: what can be computed or is a copy."""
        # Scales of keys and values matter to float8 caches alone: `runtime.model_loader.load_cache_scales`.
        patterns = [re.compile(r".*\.rotary_emb\.inv_freq"), re.compile(r".*\.self_attn\.(?:.+\.)?[kv]_scale")]
        if self.config.tie_word_embeddings:
            patterns.append(re.compile(r"lm_head\.weight"))
        if self._expert_parallel:  # the other ranks' experts
            patterns.append(re.compile(r".*\.experts\.\d+\..*"))
        return patterns

    def rename_weight(self, name: str) -> str:
        """The name that the tensor `name` of a checkpoint has in `weight_targets` (most models: the same)."""
        return name

    def unstack_weight(self, name: str) -> Sequence[str] | None:
        """Names of the tensors that lie one after the other in the checkpoint tensor `name`; None: it is one tensor."""
        return None if self.config.moe is None else names_of_stack(name, self.config.moe.num_experts)

    @abstractmethod
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Hidden states of the wanted tokens after the final norm [n, hidden_size]; fills the caches."""

    @abstractmethod
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] to [n, vocab_size], of the model's type or float32."""
