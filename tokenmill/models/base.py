"""`CausalLM`: what every model is to the loader and the runner."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from tokenmill.layers.context import LayerContext
from tokenmill.layers.forward_batch import ForwardBatch
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

    @property
    def ignored_weights(self) -> Sequence[re.Pattern[str]]:
        """Full-match patterns of checkpoint tensors that the model does not need: what can be computed or is a copy."""
        patterns = [re.compile(r".*\.rotary_emb\.inv_freq")]
        if self.config.tie_word_embeddings:
            patterns.append(re.compile(r"lm_head\.weight"))
        return patterns

    def rename_weight(self, name: str) -> str:
        """The name that the tensor `name` of a checkpoint has in `weight_targets` (most models: the same)."""
        return name

    @abstractmethod
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Hidden states after the final norm [T, hidden_size]; writes the step's keys and values to the caches."""

    @abstractmethod
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] to [n, vocab_size], of the model's type or float32."""
