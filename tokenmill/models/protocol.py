"""`CausalLM`: what every model is to the runner."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from tokenmill.layers.context import LayerContext
from tokenmill.layers.forward_batch import ForwardBatch
from tokenmill.models.config import ModelConfig


class CausalLM(nn.Module):
    """A decoder-only language model. Subclasses hold the layers under Hugging Face's module names."""

    @abstractmethod
    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Hidden states after the final norm [T, hidden_size]; writes the step's keys and values to the caches."""

    @abstractmethod
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] to [n, vocab_size] float32."""
