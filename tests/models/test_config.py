from __future__ import annotations

import math
from typing import Any

import pytest

from tests.models.test_logits import CASES
from tests.support.tiny_models import TINY_SIZES, tiny_hf_config
from tokenmill.errors import CheckpointError, UnsupportedFeatureError
from tokenmill.models.config import SUPPORTED_MODEL_TYPES, AttentionConfig, ModelConfig
from tokenmill.models.moe_config import MoeConfig

# As published beside SmolLM2-135M-Instruct (transformers 4).
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 49152,
}  # fmt: skip

# As published beside Gemma 3 4B: most numbers are left to the defaults of transformers.
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3", "torch_dtype": "bfloat16",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
}  # fmt: skip


def test_a_published_llama() -> None:
    config = ModelConfig.from_hf(SMOLLM2)
    assert (config.num_layers, config.hidden_size, config.head_dim, config.vocab_size) == (30, 576, 64, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.rope.theta == 100000.0
    assert config.rope.type == "default"
    assert config.local_rope is None
    assert config.attention == AttentionConfig(scale=0.125)
    assert set(config.layer_types) == {"full_attention"}
    assert config.window_of(0) is None
    assert config.eos_token_ids == (2,)
    assert config.bos_token_id == 1
    assert config.dtype == "bfloat16"
    assert config.tie_word_embeddings
    assert config.num_parameters() == 134_515_008
    assert config.kv_bytes_per_token(2) == 2 * 30 * 3 * 64 * 2


def test_a_published_multimodal_gemma3() -> None:
    config = ModelConfig.from_hf(GEMMA3_4B)
    assert (config.model_type, config.architecture) == ("gemma3", "Gemma3ForConditionalGeneration")
    assert (config.num_layers, config.hidden_size, config.head_dim, config.vocab_size) == (34, 2560, 256, 262_208)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert config.hidden_act == "gelu_pytorch_tanh"
    assert (config.rope.theta, config.rope.type, config.rope.factor) == (1e6, "linear", 8.0)
    assert config.local_rope is not None
    assert (config.local_rope.theta, config.local_rope.type) == (1e4, "default")
    assert config.attention.scale == 1 / 16
    assert config.layer_types[:7] == ("sliding_attention",) * 5 + ("full_attention", "sliding_attention")
    assert config.window_of(0) == 1024
    assert config.window_of(5) is None
    assert config.eos_token_ids == (1, 106)
    assert config.tie_word_embeddings
    assert config.num_parameters() == 3_880_263_168


# As published beside Qwen3-30B-A3B (transformers 4).
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def test_a_published_mixture_of_experts() -> None:
    config = ModelConfig.from_hf(QWEN3_30B)
    moe = MoeConfig(num_experts=128, top_k=8, intermediate_size=768, normalize=True, layers=(True,) * 48)
    assert config.moe == moe
    assert config.attention.qk_norm and config.rope.theta == 1e6 and config.sliding_window is None
    assert config.num_parameters() == 30_532_122_624
    assert ModelConfig.from_hf(SMOLLM2).moe is None


def test_layers_with_experts() -> None:
    config = ModelConfig.from_hf(
        {**QWEN3_30B, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    )
    assert config.moe is not None
    assert config.moe.layers == (False, True, False, False, False, True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", 0),
        ("num_experts_per_tok", 129),
        ("num_experts_per_tok", "8"),
        ("moe_intermediate_size", -1),
        ("norm_topk_prob", 1),
        ("decoder_sparse_step", 0),
        ("mlp_only_layers", 3),
        ("mlp_only_layers", ["3"]),
    ],
)
def test_an_invalid_value_of_experts_is_named(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        ModelConfig.from_hf({**QWEN3_30B, key: value})


@pytest.mark.parametrize("name", CASES)
def test_both_styles_of_transformers_read_the_same(name: str) -> None:
    """`rope_parameters` of version 5, and `rope_theta` with `rope_scaling` of version 4."""
    model_type, changes = CASES[name]
    style5 = tiny_hf_config(model_type, **changes).to_dict()
    style4 = {key: value for key, value in style5.items() if key != "rope_parameters"}
    parameters = style5["rope_parameters"]
    if "full_attention" in parameters:
        style4["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    style4["rope_theta"] = parameters["rope_theta"]
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    style4["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    assert ModelConfig.from_hf(style4) == ModelConfig.from_hf(style5)
    style4["torch_dtype"] = "bfloat16"
    assert ModelConfig.from_hf(style4).dtype == "bfloat16"


@pytest.mark.parametrize("model_type", [name for name in SUPPORTED_MODEL_TYPES if name != "gemma3"])
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """A file that gives the bare sizes means what it means to transformers."""
    from transformers import AutoConfig

    bare = {key: value for key, value in TINY_SIZES.items() if key not in ("head_dim", "num_key_value_heads")}
    bare |= {"num_attention_heads": 32, "hidden_size": 64}
    full = AutoConfig.for_model(model_type, **bare).to_dict()
    token_ids = {key: full.get(key) for key in ("eos_token_id", "bos_token_id")}
    actual = ModelConfig.from_hf({"model_type": model_type, **bare, **token_ids})
    assert actual == ModelConfig.from_hf(full)


def test_gguf_frequency_factors() -> None:
    factors = [1.0] * 31 + [8.0]
    for given in (factors, {"rope_type": "custom", "factors": factors}):
        rope = ModelConfig.from_hf({**SMOLLM2, "rope_frequency_factors": given}).rope
        assert rope.frequency_factors == tuple(factors)


def test_yarn_attention_factor() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    rope = ModelConfig.from_hf({**SMOLLM2, "rope_scaling": scaling}).rope
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4.0) + 1.0)
    rope = ModelConfig.from_hf({**SMOLLM2, "rope_scaling": {**scaling, "attention_factor": 1.0}}).rope
    assert rope.attention_factor == 1.0


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
     "max_position_embeddings"],
)  # fmt: skip
def test_a_missing_key_is_named(key: str) -> None:
    entries = {name: value for name, value in SMOLLM2.items() if name != key}
    with pytest.raises(CheckpointError, match=f"'{key}' is missing") as error:
        ModelConfig.from_hf(entries)
    assert error.value.field == "model"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", "49152"),
        ("vocab_size", 0),
        ("hidden_size", -576),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 30.5),
        ("num_attention_heads", [9]),
        ("num_attention_heads", 7),  # does not divide hidden_size, and no head_dim is given
        ("num_key_value_heads", 2),  # does not divide the query heads
        ("head_dim", 63),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", "1e-5"),
        ("rope_theta", -1.0),
        ("rope_theta", math.inf),
        ("rope_scaling", "linear"),
        ("rope_frequency_factors", [1.0]),
        ("rope_frequency_factors", [0.0] * 32),
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
        ("hidden_act", 3),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [-1]),
        ("max_position_embeddings", {}),
    ],
)
def test_an_invalid_value_is_named(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        ModelConfig.from_hf({**SMOLLM2, key: value})


@pytest.mark.parametrize(
    ("scaling", "key"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0.0}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}, "low_freq_factor"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1.5},
         "original_max_position_embeddings"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": "no"}, "truncate"),
    ],
)  # fmt: skip
def test_an_invalid_rope_value_is_named_with_its_place(scaling: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=f"'rope_scaling.{key}'"):
        ModelConfig.from_hf({**SMOLLM2, "rope_scaling": scaling})


def test_layer_types_must_fit() -> None:
    hf_config = tiny_hf_config("gemma3_text").to_dict()
    for wrong in (["full_attention"], ["full_attention"] * 2 + ["chunked_attention"], "full_attention"):
        with pytest.raises(CheckpointError, match="'layer_types'"):
            ModelConfig.from_hf({**hf_config, "layer_types": wrong})


def test_a_multimodal_model_without_a_language_model() -> None:
    with pytest.raises(CheckpointError, match="'text_config' is missing"):
        ModelConfig.from_hf({"model_type": "gemma3"})


@pytest.mark.parametrize(
    ("model_type", "hint"), [("qwen33", "Did you mean 'qwen3'?"), ("t5", "Supported: gemma3, gemma3_text, llama")]
)
def test_unknown_model_type(model_type: str, hint: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=model_type) as error:
        ModelConfig.from_hf({**SMOLLM2, "model_type": model_type})
    assert error.value.field == "model"
    assert hint in str(error.value)


@pytest.mark.parametrize("model_type", [None, 7])
def test_no_model_type(model_type: Any) -> None:
    with pytest.raises(CheckpointError, match="model_type"):
        ModelConfig.from_hf({**SMOLLM2, "model_type": model_type})


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "liner", "rope_theta": 1e4}},
        {"partial_rotary_factor": 0.5},
        {"hidden_act": "relu"},
    ],
)
def test_what_is_not_supported_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedFeatureError) as error:
        ModelConfig.from_hf({**SMOLLM2, **changes})
    assert error.value.field == "model"


def test_bidirectional_gemma_is_refused() -> None:
    hf_config = {**tiny_hf_config("gemma3_text").to_dict(), "use_bidirectional_attention": True}
    with pytest.raises(UnsupportedFeatureError, match="bidirectional"):
        ModelConfig.from_hf(hf_config)
