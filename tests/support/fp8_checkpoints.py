"""Tiny random models in directories, their weights in float8 as other programs write them; and the same dequantized."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.tiny_models import tiny_hf_model

SIZES = {
    "hidden_size": 160, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False,
}  # fmt: skip
MOE_SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
FORMATS: dict[str, dict[str, Any]] = {
    "block": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.1.self_attn.o_proj"],
    },
    "matrix": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "channel": {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }},
    },
    "tensor": {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
        }},
    },
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head", "*.mlp.gate"]},
}  # fmt: skip
"""Their `quantization_config`s."""
STATIC = ("tensor", "modelopt")


@dataclass(frozen=True)
class Fp8Model:
    """A checkpoint on disk.

    Args:
        folder: of config.json and model.safetensors.
        hf_config: without the quantization.
        exact: the weights that the float8 values and scales stand for, float32, by name.
    """

    folder: Path
    hf_config: dict[str, Any]
    exact: dict[str, torch.Tensor]


def write_fp8_model(folder: Path, kind: str, model_type: str) -> Fp8Model:
    """A model of `model_type` in the format `kind`."""
    sizes = {**SIZES, **(MOE_SIZES if model_type.endswith("moe") else {})}
    hf_model = tiny_hf_model(model_type, **sizes)
    hf_config = hf_model.config.to_dict()
    stored, exact = {}, {}
    for name, tensor in _per_expert(hf_model.state_dict()).items():
        skipped = FORMATS[kind].get("modules_to_not_convert", ())
        is_quantized = "_proj.weight" in name and name.removesuffix(".weight") not in skipped
        if not is_quantized:
            stored[name] = exact[name] = tensor.clone()
            continue
        values, factors, scales = quantize(tensor, kind)
        stored[name], exact[name] = values, values.float() * factors
        stored[f"{name}_scale_inv" if kind == "block" else f"{name}_scale"] = scales
        if kind in STATIC:
            stored[f"{name.removesuffix('weight')}input_scale"] = torch.full_like(scales, 0.05)
    if kind == "modelopt":
        stored["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors")
    written = {**hf_config, "quantization_config": FORMATS[kind]}
    (folder / "config.json").write_text(json.dumps(written, default=str))
    return Fp8Model(folder, hf_config, exact)


def quantize(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(float8 values [O, I], factor of each value, scales as `kind` stores them)."""
    if kind == "block":
        counts = tuple(-(-size // 128) for size in weight.shape)
        scales = torch.zeros(counts)
        factors = torch.zeros_like(weight)
        for row in range(counts[0]):
            for column in range(counts[1]):
                part = slice(128 * row, 128 * (row + 1)), slice(128 * column, 128 * (column + 1))
                scales[row, column] = weight[part].abs().max() / 448
                factors[part] = scales[row, column]
    elif kind == "channel":
        scales = weight.abs().amax(1, keepdim=True) / 448
        factors = scales.expand_as(weight)
    else:
        scales = weight.abs().max() / 448
        factors = scales.expand_as(weight)
        scales = scales.reshape(1) if kind == "tensor" else scales
    return (weight / factors).to(torch.float8_e4m3fn), factors, scales


def _per_expert(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacks of experts taken apart, under the names that published checkpoints use."""
    tensors = {}
    for name, tensor in state_dict.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, (gate, up) in enumerate(part.chunk(2) for part in tensor):
                tensors[f"{prefix}.{expert}.gate_proj.weight"] = gate
                tensors[f"{prefix}.{expert}.up_proj.weight"] = up
        elif last == "down_proj":
            tensors.update({f"{prefix}.{expert}.down_proj.weight": part for expert, part in enumerate(tensor)})
        else:
            tensors[name] = tensor
    return {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
