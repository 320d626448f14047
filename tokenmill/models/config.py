"""`ModelConfig`: the numbers of an architecture that every part of tokenmill needs, frozen and checked.

Built once from the `config.json` of a checkpoint (or what a GGUF file says in its place) by `ModelConfig.from_hf`; read
by the models, the runner, the memory planner and `inspect`. Both styles of transformers 4 and 5 are read, every value
is checked, and what the file leaves out takes the default of the configuration class in transformers. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

from tokenmill.errors import CheckpointError, UnsupportedFeatureError, did_you_mean
from tokenmill.layers.rope_config import RopeConfig
from tokenmill.models.hf_rope import read_rope
from tokenmill.models.hf_values import Values
from tokenmill.models.moe_config import MoeConfig, read_moe

LayerType: TypeAlias = Literal["full_attention", "sliding_attention"]

SUPPORTED_MODEL_TYPES: Final = ("gemma3", "gemma3_text", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
"""What `model_type` may be. Each names a file in `models/`; `gemma3_text` is served by `gemma3.py`."""

_ACTIVATIONS: Final = ("silu", "gelu_pytorch_tanh")
"""What `ops.activation` computes."""

_GEMMA3: Final = MappingProxyType({
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "sliding_window": 4096,
    "query_pre_attn_scalar": 256, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "eos_token_id": 1, "bos_token_id": 2,
})  # fmt: skip
_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType({
    "llama": {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e4},
    "mistral": {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e4, "sliding_window": 4096,
                "num_key_value_heads": 8},
    "mixtral": {"rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 1e6, "num_key_value_heads": 8,
                "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e4, "sliding_window": 4096,
              "max_window_layers": 28, "num_key_value_heads": 32},
    "qwen3": {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e4, "sliding_window": 4096,
              "max_window_layers": 28, "num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e4, "sliding_window": 4096,
                  "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
                  "moe_intermediate_size": 768, "norm_topk_prob": False, "decoder_sparse_step": 1},
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
})  # fmt: skip
"""Defaults of the configuration classes of transformers, by model type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """What all attention layers of a model share.

    Args:
        scale: factor on the scores.
        qkv_bias: whether the query, key and value projections have a bias.
        output_bias: whether the output projection has one.
        qk_norm: whether each query and key head is normalized before the rotation.
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`; None: unchanged.
    """

    scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One architecture with all its sizes.

    Args:
        model_type: Hugging Face's name of the architecture; the file in `models/` is named after it.
        architecture: the class named in the checkpoint, for display.
        vocab_size: rows of the embedding.
        hidden_size: features of the residual stream.
        num_layers: decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads; divides the query heads.
        head_dim: features of a head.
        intermediate_size: features inside the MLP.
        rms_norm_eps: added to the mean square in norms.
        hidden_act: Hugging Face's name of the MLP's activation.
        max_position_embeddings: the context that the model was made for, in tokens.
        rope: rotary embedding of the layers with full attention.
        local_rope: rotary embedding of the layers with a sliding window; None: the same.
        attention: what the attention layers share.
        layer_types: for each layer, whether it sees all tokens or a sliding window of them.
        sliding_window: tokens that a sliding layer sees, the current one included; None if no layer slides.
        moe: the layers that have experts in the place of one MLP; None: there are none.
        mlp_bias: whether the MLP's projections have a bias.
        sandwich_norms: whether attention and MLP are normalized after as well as before.
        final_logit_soft_cap: logits become `cap * tanh(logits / cap)`; None: unchanged.
        tie_word_embeddings: whether the output head is the embedding matrix.
        eos_token_ids: tokens that end an answer.
        bos_token_id: token that starts a text; None: none.
        dtype: type named in the checkpoint (`float32`, `bfloat16`, `float16`); None if it names none.
    """

    model_type: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    hidden_act: str
    max_position_embeddings: int
    rope: RopeConfig
    local_rope: RopeConfig | None = None
    attention: AttentionConfig
    layer_types: tuple[LayerType, ...]
    sliding_window: int | None = None
    moe: MoeConfig | None = None
    mlp_bias: bool = False
    sandwich_norms: bool = False
    final_logit_soft_cap: float | None = None
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str | None = None

    @staticmethod
    def from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face configuration, in the style of transformers 4 or 5.

        Raises:
            CheckpointError: a key is missing or invalid; the message names it.
            UnsupportedFeatureError: the model type, activation or rotary embedding is not supported.
        """
        model_type = _model_type(hf_config)
        values = Values(_language_model(hf_config, model_type), _DEFAULTS[model_type])
        is_gemma = model_type.startswith("gemma3")
        num_layers = values.integer("num_hidden_layers")
        num_heads = values.integer("num_attention_heads")
        hidden_size = values.integer("hidden_size")
        head_dim = values.integer("head_dim", default=hidden_size // num_heads)
        num_kv_heads = values.integer("num_key_value_heads", default=num_heads)
        _check_heads(values, num_heads, num_kv_heads, head_dim)
        layer_types, sliding_window = _layer_types(values, model_type, num_layers)
        max_positions = values.integer("max_position_embeddings")
        return ModelConfig(
            model_type=model_type,
            architecture=_architecture(hf_config, model_type),
            vocab_size=values.integer("vocab_size"),
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=values.integer("intermediate_size"),
            rms_norm_eps=values.number("rms_norm_eps"),
            hidden_act=_activation(values, "hidden_activation" if is_gemma else "hidden_act"),
            max_position_embeddings=max_positions,
            rope=read_rope(values, head_dim, max_positions, layer_type="full_attention"),
            local_rope=read_rope(values, head_dim, max_positions, layer_type="sliding_attention") if is_gemma else None,
            attention=_attention(values, model_type, head_dim),
            layer_types=layer_types,
            sliding_window=sliding_window,
            moe=read_moe(values, model_type, num_layers),
            mlp_bias=model_type == "llama" and values.flag("mlp_bias"),
            sandwich_norms=is_gemma,
            final_logit_soft_cap=values.optional_number("final_logit_softcapping") if is_gemma else None,
            tie_word_embeddings=values.flag("tie_word_embeddings"),
            eos_token_ids=values.token_ids("eos_token_id"),
            bos_token_id=next(iter(values.token_ids("bos_token_id")), None),
            dtype=_dtype(values),
        )

    def window_of(self, layer: int) -> int | None:
        """Tokens that `layer` sees, the current one included; None: all."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    def num_parameters(self) -> int:
        """Parameters of the whole model, tied embeddings counted once."""
        query_size = self.num_attention_heads * self.head_dim
        key_value_size = self.num_key_value_heads * self.head_dim
        qkv_size = query_size + 2 * key_value_size
        attention = self.hidden_size * (qkv_size + query_size)
        attention += qkv_size if self.attention.qkv_bias else 0
        attention += self.hidden_size if self.attention.output_bias else 0
        attention += 2 * self.head_dim if self.attention.qk_norm else 0
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += 2 * self.intermediate_size + self.hidden_size if self.mlp_bias else 0
        norms = (4 if self.sandwich_norms else 2) * self.hidden_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        num_moe_layers = 0 if self.moe is None else sum(self.moe.layers)
        feed_forward = (self.num_layers - num_moe_layers) * mlp
        if self.moe is not None:
            feed_forward += num_moe_layers * self.moe.num_parameters(self.hidden_size)
        return embeddings + self.num_layers * (attention + norms) + feed_forward + self.hidden_size

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes that the keys and values of one token take in the cache, over all layers."""
        return 2 * self.num_layers * self.num_key_value_heads * self.head_dim * dtype_bytes


def _model_type(hf_config: Mapping[str, Any]) -> str:
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            "The model's configuration has no 'model_type'.",
            field="model",
            remedy="Give a directory or file that holds a language model in Hugging Face or GGUF format.",
        )
    if model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        guess = did_you_mean(model_type, SUPPORTED_MODEL_TYPES)
        remedy = f"Supported: {supported}." + (f" {guess}" if guess.startswith("Did") else "")
        raise UnsupportedFeatureError(
            f"Models of the type '{model_type}' are not supported.", field="model", remedy=remedy
        )
    return model_type


def _language_model(hf_config: Mapping[str, Any], model_type: str) -> Mapping[str, Any]:
    """The entries of the language model: nested in a multimodal model, whose own token ids and types come first."""
    if model_type != "gemma3":
        return hf_config
    nested = hf_config.get("text_config")
    if not isinstance(nested, Mapping):
        raise Values(hf_config, {}).invalid("text_config", "an object")
    common = ("eos_token_id", "bos_token_id", "tie_word_embeddings", "dtype", "torch_dtype")
    return {**nested, **{key: hf_config[key] for key in common if hf_config.get(key) is not None}}


def _activation(values: Values, key: str) -> str:
    name = values.text(key)
    if name not in _ACTIVATIONS:
        raise UnsupportedFeatureError(
            f"The activation '{name}' ({key}) is not supported.", field="model", remedy=did_you_mean(name, _ACTIVATIONS)
        )
    return name


def _architecture(hf_config: Mapping[str, Any], model_type: str) -> str:
    names = hf_config.get("architectures")
    return str(names[0]) if isinstance(names, list | tuple) and names else model_type


def _check_heads(values: Values, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if values.get("head_dim") is None and values.integer("hidden_size") % num_heads:
        raise values.invalid("num_attention_heads", "a divisor of hidden_size, or there must be a head_dim")
    if num_heads % num_kv_heads:
        raise values.invalid("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    if head_dim % 2:
        raise values.invalid("head_dim", "an even number")
    if values.optional_number("partial_rotary_factor") not in (None, 1.0):
        raise UnsupportedFeatureError(
            "A rotary embedding of only a part of each head (partial_rotary_factor) is not supported.", field="model"
        )


def _layer_types(values: Values, model_type: str, num_layers: int) -> tuple[tuple[LayerType, ...], int | None]:
    """(type of each layer, the window of the sliding ones)."""
    window = values.optional_integer("sliding_window")
    if model_type == "llama" or (model_type.startswith("qwen") and not values.flag("use_sliding_window")):
        window = None
    listed = values.get("layer_types")
    if window is None or model_type in ("mistral", "mixtral", "qwen3_moe"):
        slides = [window is not None] * num_layers
    elif listed is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(listed, list | tuple) or len(listed) != num_layers or not set(listed) <= set(known):
            raise values.invalid("layer_types", f"one of {' or '.join(known)} for each of {num_layers} layers")
        slides = [layer_type == "sliding_attention" for layer_type in listed]
    elif model_type.startswith("gemma3"):
        pattern = values.integer("sliding_window_pattern")
        slides = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    else:
        first_sliding = values.integer("max_window_layers", minimum=0)
        slides = [layer >= first_sliding for layer in range(num_layers)]
    layer_types: list[LayerType] = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return tuple(layer_types), window if any(slides) else None


def _attention(values: Values, model_type: str, head_dim: int) -> AttentionConfig:
    bias = model_type not in ("mistral", "mixtral") and values.flag("attention_bias")
    if not model_type.startswith("gemma3"):
        is_qwen2 = model_type == "qwen2"
        return AttentionConfig(
            scale=head_dim**-0.5,
            qkv_bias=bias or is_qwen2,
            output_bias=bias and not is_qwen2,
            qk_norm=model_type in ("qwen3", "qwen3_moe"),
        )
    if values.flag("use_bidirectional_attention"):
        raise UnsupportedFeatureError("Models with bidirectional attention are not supported.", field="model")
    return AttentionConfig(
        scale=1.0 / math.sqrt(values.number("query_pre_attn_scalar")),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        soft_cap=values.optional_number("attn_logit_softcapping"),
    )


def _dtype(values: Values) -> str | None:
    """`dtype` (transformers 5) or `torch_dtype`; a type that is no floating-point type is left to the loader."""
    name = values.get("dtype") or values.get("torch_dtype")
    if name is None:
        return None
    text = str(name).removeprefix("torch.")
    return text if text in ("float32", "bfloat16", "float16") else None
