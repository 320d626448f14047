"""Engines hold the values of every kind of checkpoint, bit by bit where they can, and compute what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints.gguf_files import tiny_model, write_model
from tests.models.test_logits import CASES
from tests.support.changed_checkpoints import EXPECTED, ROWS, changed_checkpoint
from tests.support.paged_cache import PagedSequences
from tests.support.tiny_checkpoint import write_tiny_model
from tests.support.tiny_models import random_tokens, relative_error, tiny_hf_model
from tokenmill.attention.cpu import CpuAttention
from tokenmill.builder.build import build
from tokenmill.builder.engine import Engine
from tokenmill.builder.passes import PASSES
from tokenmill.checkpoints.base import open_checkpoint
from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.config import BuildConfig
from tokenmill.errors import (
    CheckpointError,
    InvalidParameterError,
    ModelNotFoundError,
    UnknownParameterError,
    UnsupportedFeatureError,
    UserError,
)
from tokenmill.runtime.torch_program import TorchProgram
from tokenmill.runtime.weight_decoding import decode_weight
from tokenmill.tokenization import load_tokenizer

pytestmark = pytest.mark.spec("D1")

BLOCKS_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")


def checkpoint_values(engine: Engine, path: Path) -> dict[str, torch.Tensor]:
    """Every weight of the engine, as the checkpoint's own reader loads it."""
    loaded = {tensor.name: tensor.load().float() for tensor in open_checkpoint(path).tensors()}
    found = {}
    for weight in engine.program.weights:
        if weight.parts:
            whole = torch.cat([loaded[part.name] for part in weight.parts])
            found[weight.name] = whole + 1.0 if weight.transform == "add_one" else whole
    return found


def engine_values(engine: Engine) -> dict[str, torch.Tensor]:
    """The same from the engine's bytes."""
    return {
        weight.name: decode_weight(weight, engine.weights[weight.name]).float()
        for weight in engine.program.weights
        if weight.parts
    }


def logits_of(engine: Engine, token_ids: list[int]) -> torch.Tensor:
    """[T, vocab_size]: a prefill in two pieces."""
    weights = {weight.name: decode_weight(weight, engine.weights[weight.name]) for weight in engine.program.weights}
    program = TorchProgram(engine.program, weights, CpuAttention())
    attention = next(operation for operation in engine.program.operations if operation.kind == "attention")
    cache = PagedSequences(
        num_layers=engine.config.model.hf_config["num_hidden_layers"],
        num_kv_heads=attention.attributes["num_kv_heads"],  # type: ignore[arg-type]
        head_dim=attention.attributes["head_dim"],  # type: ignore[arg-type]
    )
    half = len(token_ids) // 2
    pieces = [program(cache.batch([("a", piece)])) for piece in (token_ids[:half], token_ids[half:])]
    return program.compute_logits(torch.cat(pieces))


@torch.no_grad()
def hf_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.spec("D2")
@pytest.mark.parametrize("case", CASES)
def test_an_engine_computes_what_transformers_does(case: str, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    hf_model = tiny_hf_model(model_type, **changes)
    hf_model.save_pretrained(tmp_path)
    engine = build(tmp_path, dtype="float32", **ROWS)
    tokens = random_tokens(40)
    assert relative_error(logits_of(engine, tokens), hf_logits(hf_model, tokens)) < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("kind", BLOCKS_OF_32)
def test_blocks_of_a_gguf_file_are_used_as_they_are(model_type: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, tiny_model(model_type), kind)
    engine = build(path, **ROWS)
    assert engine.config.quantization == kind.lower()
    assert {weight.format for weight in engine.program.weights if len(weight.shape) == 2} == {kind.lower()}
    found, expected = engine_values(engine), checkpoint_values(engine, path)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


@pytest.mark.parametrize(
    ("quantization", "formats", "tolerance"),
    [
        ("none", {"float32"}, 0.0),
        ("int8", {"int8_group32"}, 0.005),
        ("int8_channel", {"int8_channel"}, 0.008),
        ("q8_0", {"q8_0"}, 0.005),
        ("q4_1", {"q4_1"}, 0.08),
        ("q4_0", {"q4_0"}, 0.12),
        ("q5_0", {"q5_0"}, 0.06),
    ],
)
def test_matrices_are_quantized_as_asked(
    quantization: str, formats: set[str], tolerance: float, tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "model")
    engine = build(model, quantization=quantization, **ROWS)
    linear = {operation.weights["weight"] for operation in engine.program.operations if operation.kind == "linear"}
    assert {weight.format for weight in engine.program.weights if weight.name in linear} == formats
    found, expected = engine_values(engine), checkpoint_values(engine, model)
    for name, values in expected.items():
        error = relative_error(found[name], values)
        assert error <= (tolerance if name in linear else 0.0), name
        if name in linear and tolerance:
            assert error > tolerance / 20, f"{name} was not quantized"


def test_rows_that_a_block_type_cannot_divide_become_int8(tmp_path: Path) -> None:
    hf_model = tiny_hf_model("llama")  # 48 columns
    hf_model.save_pretrained(tmp_path)
    engine = build(tmp_path, quantization="q4_0", **ROWS)
    assert engine.config.quantization == "int8_group32+q4_0"
    assert any("cannot be q4_0" in notice for notice in engine.config.report["notices"])
    found, expected = engine_values(engine), checkpoint_values(engine, tmp_path)
    for name, values in expected.items():
        assert relative_error(found[name], values) < 0.12, name


def test_a_bfloat16_checkpoint_stays_bfloat16(tmp_path: Path) -> None:
    hf_model = tiny_hf_model("llama").to(torch.bfloat16)
    hf_model.save_pretrained(tmp_path)
    engine = build(tmp_path, **ROWS)
    assert engine.config.dtype == "bfloat16"
    assert {weight.format for weight in engine.program.weights if len(weight.shape) == 2} == {"bfloat16"}
    for name, values in checkpoint_values(engine, tmp_path).items():
        assert torch.equal(engine_values(engine)[name], values), name
    assert build(tmp_path, dtype="float32", **ROWS).config.dtype == "float32"


@pytest.mark.real_model
@pytest.mark.parametrize("alias", ["smollm2:135m", "gemma3:270m"])
def test_the_demo_models_are_used_as_they_are(alias: str) -> None:
    try:
        path = resolve_model(alias, show_progress=False)
    except ModelNotFoundError as error:
        pytest.skip(f"{alias} cannot be fetched: {error}")
    engine = build(path, **ROWS)
    assert not engine.config.report["notices"]
    values = checkpoint_values(engine, path)
    for weight in engine.program.weights:
        if weight.parts:
            found = decode_weight(weight, engine.weights[weight.name]).float()
            assert torch.equal(found, values[weight.name]), weight.name


# ---- engines ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Engine:
    return build(model_dir, **ROWS)


def test_both_captures_give_the_same_program(model_dir: Path, engine: Engine) -> None:
    exported = build(model_dir, **{**ROWS, "capture": "export"})
    assert exported.program == engine.program


def test_an_engine_is_built_the_same_twice(model_dir: Path, engine: Engine) -> None:
    again = build(model_dir, **ROWS)
    assert again.program == engine.program
    for name, content in engine.weights.items():
        assert np.array_equal(again.weights[name], content), name


def test_a_saved_engine_computes_the_same(engine: Engine, tmp_path: Path) -> None:
    tokens = random_tokens(20)
    expected = logits_of(engine, tokens)
    loaded = Engine.load(engine.save(tmp_path / "engine"))
    assert isinstance(loaded, Engine)
    assert torch.equal(logits_of(loaded, tokens), expected)
    assert torch.equal(logits_of(Engine.from_buffer(engine.to_buffer()), tokens), expected)


def test_the_tokenizer_comes_along(model_dir: Path, engine: Engine, tmp_path: Path) -> None:
    loaded = Engine.load(engine.save(tmp_path / "engine"))
    assert engine.tokenizer_path == model_dir
    assert loaded.tokenizer_path is not None
    own, original = load_tokenizer(loaded.tokenizer_path), load_tokenizer(model_dir)
    messages = [{"role": "user", "content": "the quick brown fox"}]
    assert own.apply_chat_template(messages) == original.apply_chat_template(messages)
    assert own.eos_token_ids == original.eos_token_ids


@pytest.mark.real_model
def test_the_tokenizer_of_a_gguf_file_comes_along(tmp_path: Path) -> None:
    try:
        path = resolve_model("smollm2:135m", show_progress=False)
    except ModelNotFoundError as error:
        pytest.skip(f"smollm2:135m cannot be fetched: {error}")
    loaded = Engine.load(build(path, strip_weights=True, **ROWS).save(tmp_path / "engine"))
    assert loaded.tokenizer_path is not None
    own, original = load_tokenizer(loaded.tokenizer_path), load_tokenizer(path)
    text = "Café 東京 123 def f(x):\n\treturn x"
    assert own.encode(text) == original.encode(text)
    assert own.eos_token_ids == original.eos_token_ids
    assert sum(file.stat().st_size for file in (tmp_path / "engine").rglob("*") if file.is_file()) < 10 << 20


@pytest.mark.spec("D5")
def test_the_picture_is_in_the_engine_unless_it_is_not_wanted(model_dir: Path, engine: Engine, tmp_path: Path) -> None:
    page = (engine.save(tmp_path / "engine") / "graph.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    for text in ("model.layers.1.mlp.down_proj", "rope_write_cache", "merge_qkv", "Memory of a step"):
        assert text in page, text
    assert "graph.html" not in build(model_dir, picture=False, **ROWS).files


def test_a_model_without_tokenizer_is_built(tmp_path: Path) -> None:
    tiny_hf_model("llama").save_pretrained(tmp_path)
    built = build(tmp_path, **ROWS)
    assert built.config.tokenizer is None
    assert built.tokenizer_path is None


def test_progress_and_report(model_dir: Path) -> None:
    told: list[tuple[str, int, int]] = []
    built = build(model_dir, on_progress=lambda *event: told.append(event), **ROWS)
    assert list(dict.fromkeys(phase for phase, _, _ in told)) == [
        "resolve",
        "capture",
        "passes",
        "lower",
        "tune",
        "pack",
    ]
    assert all(0 <= done <= total for _, done, total in told)
    assert told[-1][1] == told[-1][2]
    report = built.config.report
    assert report["nodes_after_passes"] < report["nodes_captured"]
    assert sum(report["operations"].values()) == len(built.program.operations)
    assert sum(report["weight_bytes"].values()) == sum(content.nbytes for content in built.weights.values())
    assert report["arena_bytes"] == built.program.arena_bytes <= report["arena_sum_bytes"]
    assert report["seconds"].keys() == {"resolve", "capture", "passes", "lower", "tune", "pack"}


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.spec("D2")
def test_each_pass_can_be_left_out(model_dir: Path, engine: Engine) -> None:
    tokens = random_tokens(12)
    expected = logits_of(engine, tokens)
    for one in PASSES:
        without = build(model_dir, disabled_passes=[one.name], **ROWS)
        assert relative_error(logits_of(without, tokens), expected) < 1e-5, one.name


@pytest.mark.spec("D2")
def test_levels_and_lists_of_passes(model_dir: Path, engine: Engine) -> None:
    tokens = random_tokens(12)
    plain = build(model_dir, opt_level=0, **ROWS)
    assert len(plain.program.operations) > len(engine.program.operations)
    assert relative_error(logits_of(plain, tokens), logits_of(engine, tokens)) < 1e-5
    some = build(model_dir, passes=["simplify_views", "eliminate_dead_code", "merge_gate_up"], **ROWS)
    names = {operation.name for operation in some.program.operations}
    assert "model.layers.0.mlp.gate_up_proj" in names
    assert "model.layers.0.self_attn.q_proj" in names


def test_sizes_are_kept_and_memory_grows_with_them(model_dir: Path) -> None:
    small = build(model_dir, max_batch_size=2, max_num_tokens=16, max_seq_len=64, max_input_len=40, **ROWS)
    limits = small.config.limits
    assert (limits.max_batch_size, limits.max_num_tokens, limits.max_seq_len) == (2, 16, 64)
    assert limits.max_input_len == 40
    large = build(model_dir, max_num_tokens=512, **ROWS)
    assert large.program.arena_bytes > 8 * small.program.arena_bytes
    assert large.config.limits.max_seq_len == 4096
    assert large.config.limits.max_input_len == 4095


def test_debug_outputs_name_buffers(model_dir: Path) -> None:
    name = "model.layers.1.self_attn.o_proj"
    built = build(model_dir, debug_outputs=[name], **ROWS)
    operation = next(one for one in built.program.operations if one.name == name)
    assert built.config.debug_outputs == {name: operation.outputs["y"].buffer}


def test_engines_for_a_cpu_are_packed(model_dir: Path) -> None:
    built = build(model_dir, device="cpu", quantization="int8", capture="dispatch", opt_level=1)
    layouts = {
        operation.name: next(one.layout for one in built.program.weights if one.name == operation.weights["weight"])
        for operation in built.program.operations
        if operation.kind == "linear"
    }
    assert layouts["model.layers.0.mlp.gate_up_proj"] == "packed_gated"
    assert layouts["lm_head"] == "packed"
    assert "rows" not in layouts.values()


@pytest.mark.parametrize(
    ("options", "error", "field"),
    [
        ({"max_batch": 3}, UnknownParameterError, "max_batch"),
        ({"max_batch_size": 0}, InvalidParameterError, "max_batch_size"),
        ({"max_num_tokens": 4, "max_batch_size": 8}, InvalidParameterError, "max_num_tokens"),
        ({"max_seq_len": 5000}, InvalidParameterError, "max_seq_len"),
        ({"max_input_len": 4096}, InvalidParameterError, "max_input_len"),
        ({"max_input_len": 64, "max_seq_len": 64}, InvalidParameterError, "max_input_len"),
        ({"max_beam_width": 2}, UnsupportedFeatureError, "max_beam_width"),
        ({"kv_cache_type": "disabled"}, UnsupportedFeatureError, "kv_cache_type"),
        ({"kv_cache_type": "linear"}, InvalidParameterError, "kv_cache_type"),
        ({"dtype": "float16"}, InvalidParameterError, "dtype"),
        ({"quantization": "int3"}, InvalidParameterError, "quantization"),
        ({"opt_level": 9}, InvalidParameterError, "opt_level"),
        ({"passes": ["fuse_everything"]}, InvalidParameterError, "passes"),
        ({"passes": ["merge_gate_up", "simplify_views"]}, InvalidParameterError, "passes"),
        ({"disabled_passes": ["merge_qvk"]}, InvalidParameterError, "disabled_passes"),
        ({"disabled_passes": ["merge_qkv", "merge_qkv"]}, InvalidParameterError, "disabled_passes"),
        ({"profiles": [16, 4]}, InvalidParameterError, "profiles"),
        ({"debug_outputs": ["model.layers.0.mlp"]}, InvalidParameterError, "debug_outputs"),
        ({"debug_outputs": ["lm_had"]}, InvalidParameterError, "debug_outputs"),
        ({"device": "tpu"}, InvalidParameterError, "device"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(
    model_dir: Path, options: dict[str, Any], error: type[Exception], field: str
) -> None:
    with pytest.raises(error) as caught:
        build(model_dir, **{**ROWS, **options})
    assert caught.value.field == field  # type: ignore[attr-defined]


def test_a_continuous_cache_is_a_paged_one_and_said_so(model_dir: Path, engine: Engine) -> None:
    built = build(model_dir, **{**ROWS, "kv_cache_type": "continuous"})
    assert built.program == engine.program
    assert built.config.report["notices"] == ["kv_cache_type 'continuous' is served by the paged cache"]
    assert engine.config.report["notices"] == []


WRONG: dict[str, tuple[Any, ...]] = {
    "max_batch_size": (0, -1, "x", 1.5, None, 10**9),
    "max_num_tokens": (0, "x", 1.5, None, 10**9, 10),
    "max_input_len": (0, -1, "x", 1.5),
    "max_seq_len": (0, 1, "x", 1.5),
    "max_beam_width": (0, 2, "x", None),
    "dtype": ("float16", "fp32", None),
    "quantization": ("int3", "fp8", "INT8", None),
    "kv_cache_type": ("disabled", "linear", None),
    "kv_cache_dtype": ("float16", "fp8", None),
    "capture": ("trace", None),
    "opt_level": (-1, 3, "high", None),
    "passes": ("merge_qkv", ["merge_qkv", "merge_qkv"], 5, [1]),
    "disabled_passes": ("merge_qkv", ["merge_qkv", "merge_qkv"], None, [1]),
    "profiles": ([0], [4, 1], [1, 1], 5, [1.5], None),
    "strip_weights": ("maybe", 2, None),
    "debug_outputs": ("lm_head", ["lm_head", "lm_head"], None),
    "picture": ("maybe", None),
    "device": ("tpu", "cuda:1", None),
    "timing_cache": (5,),
    "num_threads": (0, "x", 10**6),
    "revision": (5,),
}


def test_every_field_has_wrong_values() -> None:
    assert set(WRONG) == set(BuildConfig.model_fields)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_wrong_value_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        BuildConfig(**{field: value})
    assert caught.value.field == field
    assert field in str(caught.value)
    assert "tuple" not in str(caught.value)  # to callers and configuration files they are lists
    assert "Value error" not in str(caught.value)


def test_a_configuration_and_options_exclude_each_other(model_dir: Path) -> None:
    with pytest.raises(InvalidParameterError, match="max_batch_size"):
        build(model_dir, BuildConfig(), max_batch_size=2)


def test_a_configuration_is_not_changed_by_its_owner_later(model_dir: Path) -> None:
    config = BuildConfig(**ROWS)
    built = build(model_dir, config)
    config.max_batch_size = 1
    assert built.config.limits.max_batch_size == 64


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_checkpoints_that_do_not_fit_are_refused_by_tensor(model_dir: Path, tmp_path: Path, damage: str) -> None:
    path = changed_checkpoint(model_dir, tmp_path, damage)
    with pytest.raises(CheckpointError, match=EXPECTED[damage]):
        build(path, **ROWS)
