"""GGUF files converted from models of `transformers`: weights and configuration must come back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints.gguf_files import add_tensor, finish, tiny_model, write_model
from tokenmill.checkpoints.base import Checkpoint, open_checkpoint
from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.errors import CheckpointError, ModelNotFoundError

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama with biases": ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "num_hidden_layers": 7, "query_pre_attn_scalar": 32}),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    model_type, overrides = MODELS[request.param]
    return tiny_model(model_type, **overrides)


def loaded(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    tensors = {}
    for lazy in checkpoint.tensors():
        tensor = lazy.load()
        assert (tuple(tensor.shape), tensor.dtype) == (lazy.shape, lazy.dtype)
        tensors[lazy.name] = tensor
    return tensors


@pytest.mark.spec("D6")
def test_weights_come_back_under_their_names(tmp_path: Path, model: Any) -> None:
    write_model(tmp_path / "model.gguf", model)
    expected = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    tensors = loaded(open_checkpoint(tmp_path / "model.gguf"))
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)  # 1e-6: gemma's +1 and back


@pytest.mark.spec("D6")
def test_a_model_built_from_the_configuration_computes_the_same(tmp_path: Path, model: Any) -> None:
    import transformers

    write_model(tmp_path / "model.gguf", model)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    config = dict(checkpoint.hf_config)
    rebuilt = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config.pop("model_type"), **config), dtype=torch.float32
    ).eval()
    missing, unexpected = rebuilt.load_state_dict(loaded(checkpoint), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    rebuilt.tie_weights()
    ids = torch.arange(40).reshape(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_metadata_becomes_configuration(tmp_path: Path) -> None:
    model = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 50_000.0}, rms_norm_eps=1e-5)
    write_model(
        tmp_path / "model.gguf",
        model,
        add_token_list=["<s>", "</s>", "<|eot_id|>", "<|im_end|>", *(f"t{index}" for index in range(92))],
        add_token_types=[3, 3, 3, 1, *([1] * 92)],
        add_bos_token_id=0,
        add_eos_token_id=1,
        add_pad_token_id=4,
    )
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.format == "gguf"
    assert checkpoint.quantization == "none"
    assert checkpoint.path == tmp_path / "model.gguf"
    assert checkpoint.num_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert checkpoint.hf_config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50_000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": [1, 2],  # <|eot_id|> is a control token; <|im_end|> is ordinary text here
        "pad_token_id": 4,
    }


def test_rope_scaling_and_frequency_factors(tmp_path: Path) -> None:
    model = tiny_model("llama")
    scaled = {"add_rope_scaling_type": gguf.RopeScalingType.YARN, "add_rope_scaling_factor": 4.0}
    write_model(tmp_path / "yarn.gguf", model, **scaled, add_rope_scaling_orig_ctx_len=64)
    assert open_checkpoint(tmp_path / "yarn.gguf").hf_config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    write_model(tmp_path / "linear.gguf", model, **(scaled | {"add_rope_scaling_type": gguf.RopeScalingType.LINEAR}))
    checkpoint = open_checkpoint(tmp_path / "linear.gguf")
    assert checkpoint.hf_config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    long_rope = scaled | {"add_rope_scaling_type": gguf.RopeScalingType.LONGROPE}
    write_model(tmp_path / "long.gguf", model, **long_rope)
    with pytest.raises(CheckpointError, match="longrope"):
        open_checkpoint(tmp_path / "long.gguf")

    writer = _minimal_llama(tmp_path / "factors.gguf")
    add_tensor(writer, "rope_freqs.weight", np.array([1.0, 2.0, 8.0, 8.0], np.float32), "F32")
    finish(writer)
    checkpoint = open_checkpoint(tmp_path / "factors.gguf")
    assert checkpoint.hf_config["rope_frequency_factors"] == {"rope_type": "custom", "factors": [1.0, 2.0, 8.0, 8.0]}
    assert "rope_freqs.weight" not in {tensor.name for tensor in checkpoint.tensors()}


def test_gemma3_configuration(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text", head_dim=32, num_hidden_layers=12)
    write_model(tmp_path / "model.gguf", model)
    config = open_checkpoint(tmp_path / "model.gguf").hf_config
    assert config["layer_types"] == model.config.layer_types
    assert config["sliding_window"] == model.config.sliding_window
    assert config["query_pre_attn_scalar"] == 32
    assert config["rope_local_base_freq"] == model.config.rope_parameters["sliding_attention"]["rope_theta"]
    assert config["hidden_activation"] == model.config.hidden_activation
    # the 27B model is known by its 62 layers and scales queries by hidden_size / num_attention_heads
    large = tiny_model("gemma3_text", head_dim=32, num_hidden_layers=62, num_attention_heads=8, intermediate_size=32)
    write_model(tmp_path / "large.gguf", large)
    assert open_checkpoint(tmp_path / "large.gguf").hf_config["query_pre_attn_scalar"] == 8


def test_quantization_in_words(tmp_path: Path) -> None:
    model = tiny_model("llama")
    write_model(tmp_path / "a.gguf", model, "Q8_0")
    write_model(tmp_path / "b.gguf", model, "Q8_0", add_file_type=gguf.LlamaFileType.MOSTLY_Q8_0)
    write_model(tmp_path / "c.gguf", model, "Q8_0", add_file_type=gguf.LlamaFileType.MOSTLY_Q4_K_M)
    write_model(tmp_path / "d.gguf", model, "F16", add_file_type=gguf.LlamaFileType.MOSTLY_F16)
    found = [open_checkpoint(tmp_path / f"{name}.gguf").quantization for name in "abcd"]
    assert found == ["Q8_0", "Q8_0", "Q8_0", "none"]


def _minimal_llama(path: Path, architecture: str = "llama", **overrides: Any) -> gguf.GGUFWriter:
    """A writer with the keys of a one-layer model, of which `overrides` replaces some (None leaves one out)."""
    writer = gguf.GGUFWriter(path, architecture)
    values: dict[str, Any] = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 16,
        "feed_forward_length": 32,
        "head_count": 2,
        "layer_norm_rms_eps": 1e-5,
    }
    for key, value in (values | overrides).items():
        if value is not None:
            getattr(writer, f"add_{key}")(value)
    add_tensor(writer, "token_embd.weight", np.zeros((8, 16)), "F32")
    return writer


_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no layer count": ({"block_count": None}, r"llama\.block_count.* is missing"),
    "more layers than tensors": ({"block_count": 10**9}, "claims 1000000000 layers"),
    "zero heads": ({"head_count": 0}, r"head_count.* is 0"),
    "heads per layer": ({"head_count": [2, 4]}, r"head_count.* is \[2, 4\]"),
    "more heads than columns": ({"head_count": 64}, "odd size 0"),
    "embedding of another size": ({"embedding_length": 32}, "16 columns where the metadata says 32"),
    "nan epsilon": ({"layer_norm_rms_eps": float("nan")}, r"rms_epsilon.* is nan"),
    "experts": ({"expert_count": 8}, r"expert_used_count.* is missing"),
    "partial rotary": ({"rope_dimension_count": 4}, "rotary embedding covers only a part"),
    "other value heads": ({"value_length": 4}, "value heads differ"),
    "heads that do not divide": ({"head_count": 4, "head_count_kv": 3}, "not a multiple"),
}


@pytest.mark.parametrize("what", _REFUSED)
def test_metadata_that_makes_no_model_is_refused(tmp_path: Path, what: str) -> None:
    overrides, text = _REFUSED[what]
    finish(_minimal_llama(tmp_path / "model.gguf", **overrides))
    with pytest.raises(CheckpointError, match=text) as caught:
        open_checkpoint(tmp_path / "model.gguf")
    assert str(tmp_path / "model.gguf") in str(caught.value)
    assert caught.value.field == "model"
    assert caught.value.remedy


def test_same_value_for_every_layer_counts_as_one(tmp_path: Path) -> None:
    finish(_minimal_llama(tmp_path / "model.gguf", head_count=[2, 2], head_count_kv=[1, 1]))
    assert open_checkpoint(tmp_path / "model.gguf").hf_config["num_key_value_heads"] == 1


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    finish(_minimal_llama(tmp_path / "model.gguf", "gptneox"))
    with pytest.raises(CheckpointError, match=r"'gptneox'.*llama, qwen2, qwen3, qwen3moe, gemma3"):
        open_checkpoint(tmp_path / "model.gguf")


def test_split_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    writer = _minimal_llama(tmp_path / "part.gguf")
    writer.add_uint16("split.count", 3)
    finish(writer)
    with pytest.raises(CheckpointError, match=r"one of 3 parts.*--merge"):
        open_checkpoint(tmp_path / "part.gguf")
    writer = _minimal_llama(tmp_path / "type.gguf")
    blocks = np.zeros((1, 292), dtype=np.uint8)
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    finish(writer)
    with pytest.raises(CheckpointError, match="type Q8_K, which cannot be dequantized"):
        open_checkpoint(tmp_path / "type.gguf")


def test_projection_that_its_heads_cannot_share(tmp_path: Path) -> None:
    writer = _minimal_llama(tmp_path / "model.gguf")
    add_tensor(writer, "blk.0.attn_q.weight", np.zeros((6, 16)), "F32")
    finish(writer)
    with pytest.raises(CheckpointError, match="6 rows, which 2 heads cannot share"):
        loaded(open_checkpoint(tmp_path / "model.gguf"))


def test_unknown_tensor_keeps_its_name(tmp_path: Path) -> None:
    writer = _minimal_llama(tmp_path / "model.gguf")
    add_tensor(writer, "blk.0.mystery.weight", np.zeros((2, 2)), "F32")
    finish(writer)
    names = [tensor.name for tensor in open_checkpoint(tmp_path / "model.gguf").tensors()]
    assert names == ["model.embed_tokens.weight", "blk.0.mystery.weight"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_checkpoint_errors_only(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.gguf"
    if not path.exists():
        finish(_minimal_llama(path, key_length=8, rope_scaling_factor=2.0, head_count_kv=[1, 1], file_type=7))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.sampled_from([0, 4, 8, 9, 0xFF]) | st.integers(0, 255))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    try:
        loaded(open_checkpoint(damaged))
    except CheckpointError as error:
        assert str(damaged) in str(error)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_weights_equal_what_transformers_reads(tmp_path: Path, model_type: str) -> None:
    """The reader of `transformers` as a second opinion on names, reordered projections and norms."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = tiny_model(model_type, num_hidden_layers=1, tie_word_embeddings=True)
    write_model(tmp_path / "model.gguf", model, "Q8_0")
    expected = load_gguf_checkpoint(tmp_path / "model.gguf", return_tensors=True, model_to_load=model)["tensors"]
    tensors = loaded(open_checkpoint(tmp_path / "model.gguf"))
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.real_model
@pytest.mark.spec("D6")
@pytest.mark.parametrize("alias", ["smollm2:135m", "gemma3:270m"])
def test_real_files_hold_exactly_the_model_that_they_describe(alias: str) -> None:
    import transformers

    try:
        path = resolve_model(alias, show_progress=False)
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    checkpoint = open_checkpoint(path)
    config = dict(checkpoint.hf_config)
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config.pop("model_type"), **config)
        )
    expected = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    assert {tensor.name: tensor.shape for tensor in checkpoint.tensors()} == expected
    # published configurations of the two models
    published: dict[str, Any] = {
        "smollm2:135m": {"rope_theta": 100_000, "rms_norm_eps": 1e-5, "head_dim": 64, "eos_token_id": 2},
        "gemma3:270m": {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "head_dim": 256, "query_pre_attn_scalar": 256},
    }[alias]
    assert {key: checkpoint.hf_config[key] for key in published} == published
    assert checkpoint.quantization == {"smollm2:135m": "Q4_1", "gemma3:270m": "Q4_K_M"}[alias]
    # embeddings of trained models have small values, and their norms are not the ones of an untrained model
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors()}
    norm = tensors["model.layers.0.input_layernorm.weight"].load()
    assert torch.isfinite(norm).all()
    assert norm.std() > 0.01
