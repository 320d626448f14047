"""Tiny random models of every architecture: the transformers model, and tokenmill's with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.support.paged_cache import PagedSequences
from tokenmill.attention.select import select_backend
from tokenmill.layers.context import LayerContext
from tokenmill.layers.weights import finalize_weights, weight_targets
from tokenmill.models import load_model_class
from tokenmill.models.base import CausalLM
from tokenmill.models.config import ModelConfig
from tokenmill.parallel.group import ParallelGroup

CPU = torch.device("cpu")

TINY_SIZES: Mapping[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
"""Small, and no two of them equal, so that mixed-up sizes cannot pass."""
TINY_MOE: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
}
"""What models with experts have besides."""


def tiny_hf_config(model_type: str, **changes: Any) -> Any:
    """A transformers configuration object of tiny size."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        model_type, **{**TINY_SIZES, **TINY_MOE.get(model_type, {}), "pad_token_id": 0, **changes}
    )


def tiny_hf_model(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    """A transformers model of tiny size with random weights large enough to matter, biases and norms included."""
    from transformers import AutoModelForCausalLM

    config = tiny_hf_config(model_type, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def build_model(
    hf_config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    attn_backend: str = "auto",
    group: ParallelGroup | None = None,
    expert_parallel: bool = False,
) -> CausalLM:
    """tokenmill's model of a Hugging Face configuration, with the weights of `state_dict`, finalized."""
    config = ModelConfig.from_hf(hf_config)
    backend = select_backend(attn_backend, CPU)
    context = LayerContext(
        dtype=dtype,
        device=CPU,
        backend=backend,
        group=group or ParallelGroup(),
        expert_parallel=expert_parallel,
    )
    model = load_model_class(config.model_type)(config, context)
    copy_weights(model, state_dict)
    finalize_weights(model)
    return model


def copy_weights(model: CausalLM, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Fill `model`; every tensor of `state_dict` must be used or ignored by the model, every parameter filled."""
    targets = weight_targets(model)
    filled = set()
    for name, tensor in unstacked(model, state_dict).items():
        if name in targets:
            targets[name].load(tensor)
            filled.add(name)
        else:
            assert any(pattern.fullmatch(name) for pattern in model.ignored_weights), f"{name} is left over"
    assert filled == targets.keys(), f"not in the checkpoint: {sorted(targets.keys() - filled)}"


def unstacked(model: CausalLM, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the model's own names; those that hold several are taken apart."""
    tensors = {}
    for name, tensor in state_dict.items():
        own_name = model.rename_weight(name)
        names = model.unstack_weight(own_name)
        parts = [tensor] if names is None else tensor.reshape(len(names), -1, tensor.shape[-1])
        tensors.update(zip([own_name] if names is None else names, parts, strict=True))
    return tensors


def sequences_for(
    model: CausalLM, *, tokens_per_block: int = 16, num_kv_heads: int | None = None, dtype: torch.dtype = torch.float32
) -> PagedSequences:
    """An empty paged cache for `model`; `num_kv_heads` of this rank, if there are several."""
    config = model.config
    return PagedSequences(
        num_layers=config.num_layers,
        num_kv_heads=num_kv_heads or config.num_key_value_heads,
        head_dim=config.head_dim,
        tokens_per_block=tokens_per_block,
        dtype=dtype,
    )


@torch.inference_mode()
def all_logits(model: CausalLM, sequences: PagedSequences, rows: list[tuple[str, list[int]]]) -> torch.Tensor:
    """Run one step; logits of every token of it, [T, vocab_size] float32."""
    return model.compute_logits(model(sequences.batch(rows))).float()


def random_tokens(count: int, seed: int = 0, vocab_size: int = 61) -> list[int]:
    """Token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count,), generator=generator).tolist()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, in units of the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def parameter_count(model: nn.Module) -> int:
    """Numbers in the model's parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
