"""Programs of tiny models: captured, lowered, and run by the definitions of their operations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch

from tests.support.paged_cache import PagedSequences
from tests.support.tiny_models import tiny_hf_model, unstacked
from tokenmill.builder.capture import capture
from tokenmill.builder.graph import Graph
from tokenmill.builder.lowering import lower
from tokenmill.builder.memory_plan import plan_memory
from tokenmill.builder.passes import run_passes
from tokenmill.builder.recording import capture_context
from tokenmill.layers.weights import weight_targets
from tokenmill.models import load_model_class
from tokenmill.models.config import ModelConfig
from tokenmill.program.checks import check_program
from tokenmill.program.program import Program
from tokenmill.program.reference import run_program

SLIDING = {"sliding_window": 7}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied_biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama_yarn": ("llama", {"rope_parameters": {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.7}}),
    "mistral": ("mistral", SLIDING),
    "qwen2": ("qwen2", {**SLIDING, "use_sliding_window": True, "max_window_layers": 1}),
    "mixtral": ("mixtral", SLIDING),
    "qwen3_moe": (
        "qwen3_moe",
        {"decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [3], "norm_topk_prob": True},
    ),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "gemma3": (
        "gemma3_text",
        {
            **SLIDING,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "final_logit_softcapping": 5.0,
        },
    ),
}
"""Every architecture in a variant that has much of what it can have: model type and changes of the configuration."""


def tiny_model(name: str) -> Any:
    """The transformers model of an entry of `ARCHITECTURES`."""
    model_type, changes = ARCHITECTURES[name]
    return tiny_hf_model(model_type, **changes)


def captured(hf_model: Any, method: Literal["export", "dispatch"] = "dispatch") -> Graph:
    """The graph of tokenmill's model of the same configuration."""
    return capture(ModelConfig.from_hf(hf_model.config.to_dict()), method=method)


def compiled(graph: Graph, disabled: Collection[str] = (), *, max_tokens: int = 64) -> Program:
    """The program of a graph without the `disabled` passes, with its memory planned."""
    program = lower(run_passes(graph, disabled=disabled)[0])
    check_program(program)
    return plan_memory(program, max_tokens=max_tokens, max_rows=max_tokens)


def tensors_of(hf_model: Any) -> dict[str, torch.Tensor]:
    """The weights of the transformers model under tokenmill's names, tied ones once."""
    config = ModelConfig.from_hf(hf_model.config.to_dict())
    model = load_model_class(config.model_type)(config, capture_context(torch.float32))
    tensors = unstacked(model, hf_model.state_dict())
    return {name: tensor for name, tensor in tensors.items() if name in weight_targets(model)}


def program_weights(program: Program, graph: Graph, hf_model: Any) -> dict[str, torch.Tensor]:
    """Every weight in float32, from the transformers model."""
    state_dict = tensors_of(hf_model)
    found = {}
    for weight in program.weights:
        if weight.name in graph.constants:
            found[weight.name] = torch.tensor(graph.constants[weight.name])
            continue
        tensor = torch.cat([state_dict[part.name].float() for part in weight.parts])
        assert tuple(tensor.shape) == weight.shape
        assert [state_dict[part.name].shape[0] for part in weight.parts] == [part.num_rows for part in weight.parts]
        found[weight.name] = tensor + 1.0 if weight.transform == "add_one" else tensor
    return found


@torch.no_grad()
def program_logits(
    program: Program,
    weights: Mapping[str, torch.Tensor],
    sequences: PagedSequences,
    rows: list[tuple[str, list[int]]],
    row_index: list[int] | None = None,
) -> torch.Tensor:
    """Run one step; logits of the tokens at `row_index`, or of all: [R, vocab_size]."""
    batch = sequences.batch(rows)
    num_tokens = batch.input_ids.shape[0]
    inputs = {
        "token_ids": batch.input_ids.int(),
        "positions": batch.positions.int(),
        "row_index": torch.tensor(range(num_tokens) if row_index is None else row_index, dtype=torch.int32),
    }
    return run_program(program, weights, inputs, batch.attention, batch.caches)


def empty_cache(hf_model: Any, *, tokens_per_block: int = 8) -> PagedSequences:
    """A paged cache for the model."""
    config = ModelConfig.from_hf(hf_model.config.to_dict())
    return PagedSequences(
        num_layers=config.num_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        tokens_per_block=tokens_per_block,
    )
