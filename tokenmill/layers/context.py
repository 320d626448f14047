"""`LayerContext`: the only thing that a model and its layers get from outside, besides the architecture's numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from tokenmill.attention.base import AttentionBackend
from tokenmill.layers.weights import join_name
from tokenmill.parallel.group import ParallelGroup
from tokenmill.quantization.base import ExpertsMethodFactory, LinearMethodFactory
from tokenmill.quantization.unquantized import unquantized, unquantized_experts


@dataclass(frozen=True, slots=True)
class LayerContext:
    """How layers are built, not what they are.

    Args:
        dtype: type of weights and activations.
        device: where weights live.
        backend: what every attention layer calls.
        linear_method: makes the `LinearMethod` of each linear layer, by the layer's full name.
        experts_method: makes the `ExpertsMethod` of the experts of each layer, by their full name.
        group: the ranks over which layers are sharded.
        batch_invariant: whether a token's numbers shall have the same bits in any company.
        expert_parallel: whether each rank holds some experts whole, instead of a part of every expert.
        prefix: full name of the module that is being built.
    """

    dtype: torch.dtype
    device: torch.device
    backend: AttentionBackend
    linear_method: LinearMethodFactory = unquantized
    experts_method: ExpertsMethodFactory = unquantized_experts
    group: ParallelGroup = field(default_factory=ParallelGroup)
    batch_invariant: bool = False
    expert_parallel: bool = False
    prefix: str = ""

    def child(self, name: str) -> LayerContext:
        """The context for the submodule `name`."""
        return replace(self, prefix=join_name(self.prefix, name))
