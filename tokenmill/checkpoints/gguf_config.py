"""GGUF metadata to a Hugging Face style configuration, for the architectures that tokenmill knows.

Called by `gguf_checkpoint`. GGUF says what differs between files; what every model of an architecture shares (the
activation, Gemma's layer pattern) is not in the file and is filled in here, as in the models' published configurations.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np

from tokenmill.checkpoints.gguf_reader import GgufFile
from tokenmill.errors import CheckpointError

# GGUF architecture: model_type and class name of Hugging Face. Mistral files call themselves llama, as do those of
# Mixtral, which has experts.
_ARCHITECTURES: Final = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
_LLAMA_WITH_EXPERTS: Final = ("mixtral", "MixtralForCausalLM")
_GEMMA3_PATTERN: Final = 6  # every sixth layer sees the whole context
_GEMMA3_27B_LAYERS: Final = 62

# Many files name only one end token, though chat models end their turn with another. These texts, where they are
# control tokens of the vocabulary, end an answer too.
_END_OF_TURN_TEXTS: Final = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|eom_id|>", "<|end|>")
_QWEN_END_OF_TEXT: Final = "<|endoftext|>"
_CONTROL_TOKEN: Final = 3
_MAX_FLOAT32: Final = 3.4028234e38


def hf_config_from_gguf(file: GgufFile) -> dict[str, Any]:
    """The configuration of the model in `file`.

    Raises:
        CheckpointError: the architecture is unknown, a needed key is missing or has a wrong type, or the file uses a
            feature of its architecture that tokenmill's model lacks.
    """
    keys = _Keys(file)
    model_type, class_name = _ARCHITECTURES[keys.architecture]
    if model_type == "llama" and keys.get("expert_count"):
        model_type, class_name = _LLAMA_WITH_EXPERTS
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise keys.invalid("it has no tensor 'token_embd.weight' of two dimensions")
    num_heads = keys.integer("attention.head_count")
    hidden_size = keys.integer("embedding_length")
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [class_name],
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": keys.integer("attention.key_length", hidden_size // num_heads),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(keys),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }
    if embedding.shape[1] != hidden_size:
        raise keys.invalid(f"its embedding has {embedding.shape[1]} columns where the metadata says {hidden_size}")
    if config["num_hidden_layers"] > len(file.tensors):
        raise keys.invalid(f"it claims {config['num_hidden_layers']} layers with {len(file.tensors)} tensors")
    _refuse_unsupported(keys, config)
    if model_type in ("qwen3_moe", "mixtral"):
        config.update(_experts(keys, model_type))
    if model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    config.update(_gemma3(keys, config) if model_type == "gemma3_text" else {"hidden_act": "silu"})
    end_texts = (*_END_OF_TURN_TEXTS, _QWEN_END_OF_TEXT) if model_type.startswith("qwen") else _END_OF_TURN_TEXTS
    config.update(_special_tokens(file.metadata, end_texts))
    if "rope_freqs.weight" in file.tensors:
        factors = file.read("rope_freqs.weight").tolist()
        config["rope_frequency_factors"] = {"rope_type": "custom", "factors": factors}
    return config


class _Keys:
    """Typed access to the metadata keys `<architecture>.<key>`."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
            raise CheckpointError(
                f"{file.path} holds a model of the architecture {architecture!r}, which is not supported.",
                field="model",
                remedy=f"Known GGUF architectures: {', '.join(_ARCHITECTURES)}.",
            )
        self.architecture: str = architecture

    def invalid(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file.path} is not a usable {self.architecture} model: {what}.",
            field="model",
            remedy="Convert the model again with a current converter, or use another file.",
        )

    def get(self, key: str) -> Any:
        """The value, or None; an array of equal values (one for each layer) counts as one."""
        value = self._file.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, np.ndarray):
            values = set(value.tolist())
            return values.pop() if len(values) == 1 else value.tolist()
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.invalid(f"the key '{self.architecture}.{key}' is {_short(value)} instead of a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_FLOAT32:
            raise self.invalid(f"the key '{self.architecture}.{key}' is {_short(value)} instead of a positive number")
        # The file stores 32 bits: 9.99999974e-06 is the nearest float32 to the 1e-05 of the original configuration.
        shortest = float(f"{value:.7g}")
        return shortest if struct.pack("<f", shortest) == struct.pack("<f", value) else float(value)


def _short(value: object) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _refuse_unsupported(keys: _Keys, config: dict[str, Any]) -> None:
    head_dim: int = config["head_dim"]
    if head_dim < 2 or head_dim % 2:
        raise keys.invalid(f"its attention heads have the odd size {head_dim}")
    if config["model_type"] not in ("qwen3_moe", "mixtral") and keys.get("expert_count") not in (None, 0):
        raise keys.invalid("it is a mixture of experts, which is not supported")
    if keys.integer("rope.dimension_count", head_dim) != head_dim:
        raise keys.invalid("its rotary embedding covers only a part of each head, which is not supported")
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.invalid("its value heads differ in size from its key heads, which is not supported")
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        raise keys.invalid("its number of attention heads is not a multiple of its key and value heads")


def _experts(keys: _Keys, model_type: str) -> dict[str, Any]:
    """Every layer has experts, whose shares sum up to 1."""
    if model_type == "mixtral":
        return {
            "num_local_experts": keys.integer("expert_count"),
            "num_experts_per_tok": keys.integer("expert_used_count"),
        }
    return {
        "num_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _rope_scaling(keys: _Keys) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling` entry; None when positions are not scaled."""
    kind = keys.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise keys.invalid(f"its rope scaling is {_short(kind)}; known are linear and yarn")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
        optional = {"attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
        for key, name in optional.items():
            if keys.get(f"rope.scaling.{key}") is not None:
                scaling[name] = keys.number(f"rope.scaling.{key}")
    return scaling


def _gemma3(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    num_layers: int = config["num_hidden_layers"]
    # Only the largest Gemma 3 scales its queries by the width of the model shared out over its heads.
    is_27b = num_layers == _GEMMA3_27B_LAYERS
    head_share = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": head_share if is_27b else config["head_dim"],
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": [
            "full_attention" if (layer + 1) % _GEMMA3_PATTERN == 0 else "sliding_attention"
            for layer in range(num_layers)
        ],
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def _special_tokens(metadata: dict[str, Any], end_texts: tuple[str, ...]) -> dict[str, Any]:
    def token_id(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    end_ids = [found for name in ("eos", "eot", "eom") if (found := token_id(name)) is not None]
    tokens, token_types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(token_types, np.ndarray) and len(tokens) == len(token_types):
        controls = np.flatnonzero(token_types == _CONTROL_TOKEN).tolist()
        end_ids += [index for index in controls if tokens[index] in end_texts]
    end_ids = list(dict.fromkeys(end_ids))
    return {
        "bos_token_id": token_id("bos"),
        "eos_token_id": end_ids[0] if len(end_ids) == 1 else end_ids or None,
        "pad_token_id": token_id("padding"),
    }
