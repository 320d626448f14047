"""`feed_forward`: what follows attention in a decoder layer, one gated MLP or a mixture of experts."""

from __future__ import annotations

from tokenmill.layers.context import LayerContext
from tokenmill.layers.mlp import GatedMLP
from tokenmill.layers.moe import SparseMoe
from tokenmill.models.config import ModelConfig


def feed_forward(config: ModelConfig, layer: int, context: LayerContext) -> GatedMLP | SparseMoe:
    """The module `mlp` of decoder layer `layer`: [T, hidden_size] to [T, hidden_size]."""
    moe = config.moe
    if moe is not None and moe.layers[layer]:
        return SparseMoe(
            config.hidden_size,
            moe.intermediate_size,
            num_experts=moe.num_experts,
            top_k=moe.top_k,
            activation=config.hidden_act,
            normalize=moe.normalize,
            context=context,
        )
    return GatedMLP(
        config.hidden_size, config.intermediate_size, config.hidden_act, bias=config.mlp_bias, context=context
    )
