"""`MoeConfig`: the mixture of experts of a model, read from a Hugging Face configuration. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenmill.models.hf_values import Values

MOE_MODEL_TYPES = ("mixtral", "qwen3_moe")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """The layers that have experts in the place of one MLP.

    Args:
        num_experts: experts of a layer.
        top_k: experts that a token goes to.
        intermediate_size: features inside an expert.
        normalize: whether the shares of a token's experts sum up to 1.
        layers: for each layer, whether it has experts.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    normalize: bool
    layers: tuple[bool, ...]

    def num_parameters(self, hidden_size: int) -> int:
        """Of one layer: router and experts."""
        return hidden_size * self.num_experts * (1 + 3 * self.intermediate_size)


def read_moe(values: Values, model_type: str, num_layers: int) -> MoeConfig | None:
    """The mixture of experts of `model_type`; None if it has none.

    Raises:
        CheckpointError: a key is missing or invalid.
    """
    if model_type not in MOE_MODEL_TYPES:
        return None
    is_qwen = model_type == "qwen3_moe"
    # transformers 5 writes `num_local_experts` for both; what older files call it comes second.
    names = ("num_local_experts", "num_experts") if is_qwen else ("num_local_experts",)
    key = next((name for name in names if values.is_set(name)), names[-1])
    num_experts = values.integer(key)
    top_k = values.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise values.invalid("num_experts_per_tok", f"at most {key} ({num_experts})")
    return MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=values.integer("moe_intermediate_size" if is_qwen else "intermediate_size"),
        normalize=values.flag("norm_topk_prob") if is_qwen else True,
        layers=_layers(values, num_layers) if is_qwen else (True,) * num_layers,
    )


def _layers(values: Values, num_layers: int) -> tuple[bool, ...]:
    step = values.integer("decoder_sparse_step")
    dense: Any = values.get("mlp_only_layers") or ()
    if not isinstance(dense, list | tuple) or not all(type(layer) is int for layer in dense):
        raise values.invalid("mlp_only_layers", "a list of layer numbers")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
