"""GGUF files for the tests, written with the gguf library's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize

QUANTIZABLE = ("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")

_HF_TYPE = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
_SHAPES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "head_dim": 16,
}
"""What a tiny model with experts has besides, and what its file says of them."""
EXPERTS_METADATA = {"add_expert_count": 4, "add_expert_used_count": 2, "add_expert_feed_forward_length": 64}


def tiny_model(model_type: str, **overrides: Any) -> Any:
    """A random model of `transformers`, every weight (norms too) away from its initial value."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **{**_SHAPES, **overrides})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def interleave_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The order of rows in llama files: value i of the first half of a head, then value i of its second half."""
    head_dim = weight.shape[0] // num_heads
    rows = [
        head * head_dim + half * head_dim // 2 + index
        for head in range(num_heads)
        for index in range(head_dim // 2)
        for half in (0, 1)
    ]
    return weight[rows]


def write_model(
    path: Path, model: Any, kind: str = "F32", *, kinds: Mapping[str, str] | None = None, **metadata: Any
) -> None:
    """Convert a model of `transformers` as llama.cpp's converter does; matrices become blocks of type `kind`, those of
    layers whose names are in `kinds` of the type there."""
    config = model.config
    architecture = _HF_TYPE[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None) and config.model_type != "llama":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in metadata.items():
        getattr(writer, key)(value)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in _unmerged(model.state_dict()).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if config.model_type in ("llama", "mixtral") and ".q_proj." in name:
            array = interleave_rotary(array, config.num_attention_heads)
        if config.model_type in ("llama", "mixtral") and ".k_proj." in name:
            array = interleave_rotary(array, config.num_key_value_heads)
        if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
            array = array + 1
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        own = (kinds or {}).get(gguf_name.split(".")[-2], kind)
        add_tensor(writer, gguf_name, array, "F32" if array.ndim == 1 else own)
    finish(writer)


def _unmerged(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With a stack of all experts for each projection, as published models are converted."""
    tensors = {}
    for name, tensor in state_dict.items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            tensors[f"{prefix}gate_proj.weight"], tensors[f"{prefix}up_proj.weight"] = tensor.chunk(2, dim=1)
        else:
            tensors[f"{name}.weight" if name.endswith("experts.down_proj") else name] = tensor
    return tensors


def add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, quantize(np.ascontiguousarray(array, np.float32), quantization), raw_dtype=quantization)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
