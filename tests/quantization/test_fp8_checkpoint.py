"""Tiny float8 checkpoints of every kind, loaded from disk, against the same model with the dequantized weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.fp8_checkpoints import FORMATS, STATIC, Fp8Model, write_fp8_model
from tests.support.tiny_models import CPU, all_logits, build_model, random_tokens, relative_error, sequences_for
from tokenmill.attention.select import select_backend
from tokenmill.checkpoints.base import open_checkpoint
from tokenmill.config import LlmArgs
from tokenmill.errors import CheckpointError, UnsupportedFeatureError
from tokenmill.layers.context import LayerContext
from tokenmill.layers.linear import MergedColumnLinear
from tokenmill.layers.moe import SparseMoe
from tokenmill.layers.weights import finalize_weights, weight_targets
from tokenmill.models.base import CausalLM
from tokenmill.models.config import ModelConfig
from tokenmill.ops.block_fp8 import BlockScaledWeight, block_scaled_linear
from tokenmill.ops.fp8 import static_quantize_fp8
from tokenmill.ops.moe import run_experts_reference
from tokenmill.quantization import fp8_checkpoint
from tokenmill.quantization.base import RowForm
from tokenmill.quantization.checkpoint_format import Fp8Format
from tokenmill.quantization.fp8_checkpoint import BlockFp8Linear, CheckpointFp8Experts, ScaledFp8Linear
from tokenmill.quantization.select import methods_for
from tokenmill.runtime.model_loader import load_model

CASES = [(kind, model_type) for kind in FORMATS for model_type in ("qwen3", "qwen3_moe")]


def load(folder: Path) -> CausalLM:
    checkpoint = open_checkpoint(folder)
    config = ModelConfig.from_hf(checkpoint.hf_config)
    args = LlmArgs(model=folder)
    return load_model(args, config, checkpoint, CPU, torch.float32, select_backend("auto", CPU))


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CausalLM, CausalLM]:
    """(format, the model from disk, the model with the weights that it stands for)."""
    kind, model_type = request.param
    written = write_fp8_model(tmp_path_factory.mktemp(kind), kind, model_type)
    return kind, load(written.folder), build_model(written.hf_config, written.exact)


@pytest.mark.spec("E5")
def test_single_tokens_see_the_dequantized_weights(models: tuple[str, CausalLM, CausalLM]) -> None:
    _, model, exact = models
    sequences, exact_sequences = sequences_for(model), sequences_for(exact)
    for token in random_tokens(6):
        actual = all_logits(model, sequences, [("a", [token])])
        assert relative_error(actual, all_logits(exact, exact_sequences, [("a", [token])])) < 1e-4


def test_prompts_are_quantized_on_the_way(models: tuple[str, CausalLM, CausalLM]) -> None:
    """Near for most tokens: where two experts are close, rounding may pick the other one."""
    kind, model, exact = models
    token_ids = random_tokens(40)
    actual = all_logits(model, sequences_for(model), [("a", token_ids)])
    expected = all_logits(exact, sequences_for(exact), [("a", token_ids)])
    errors = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    assert 1e-4 < float(errors.median()) < (0.3 if kind in STATIC else 0.15)


def test_products_added_to_the_stream(models: tuple[str, CausalLM, CausalLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but by two operations."""
    kind, model, _ = models
    rows = [("a", random_tokens(40))]
    expected = all_logits(model, sequences_for(model), rows)
    added: list[int] = []
    monkeypatch.setattr(fp8_checkpoint, "adds_product", lambda num_rows, weight, dtype: True)
    monkeypatch.setattr("tokenmill.ops.fp8.add_scaled_product", lambda total, *_: bool(added.append(len(total))))
    actual = all_logits(model, sequences_for(model), rows)
    assert set(added) == (set() if "block" in kind else {40})
    assert relative_error(actual, expected) < 1e-6


def test_a_stack_of_merged_projections_keeps_each_ones_scale() -> None:
    stored = Fp8Format(weight_scales="matrix", static_inputs=True, scale_shape=(1,))
    layer = torch.nn.Module()
    linear, _ = methods_for(None, stored)
    context = LayerContext(dtype=torch.float32, device=CPU, backend=select_backend("auto", CPU), linear_method=linear)
    layer.gate_up_proj = MergedColumnLinear(6, {"gate_proj": 5, "up_proj": 7}, bias=False, context=context)
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(size, 6, generator=generator).to(torch.float8_e4m3fn)
        for name, size in (("gate", 5), ("up", 7))
    }
    targets = weight_targets(layer)
    scales, inputs = {"gate": 0.5, "up": 3.0}, {"gate": 0.01, "up": 0.02}
    for name in ("up", "gate"):
        targets[f"{name}_proj.weight"].load(values[name])
        targets[f"{name}_proj.weight_scale"].load(torch.tensor([scales[name]]))
        targets[f"{name}_proj.input_scale"].load(torch.tensor([inputs[name]]))
    finalize_weights(layer)
    exact = torch.cat([values[name].float() * scales[name] for name in ("gate", "up")])
    x = torch.randn(3, 6, generator=generator)
    torch.testing.assert_close(layer.gate_up_proj(x[:1]), x[:1] @ exact.T, atol=1e-5, rtol=1e-5)
    rows = static_quantize_fp8(x, torch.tensor([0.02]))
    torch.testing.assert_close(layer.gate_up_proj(x), rows.values.float() * 0.02 @ exact.T, atol=1e-5, rtol=1e-5)
    assert isinstance(layer.gate_up_proj.method, ScaledFp8Linear)
    assert layer.gate_up_proj.row_form(x) is RowForm.PLAIN


def test_experts_take_the_largest_static_scale() -> None:
    """One for gate and up of all experts, one for their down projections."""
    stored = Fp8Format(weight_scales="matrix", static_inputs=True, scale_shape=(1,))
    _, method = methods_for(None, stored)
    context = LayerContext(dtype=torch.float32, device=CPU, backend=select_backend("auto", CPU), experts_method=method)
    layer = torch.nn.Module()
    layer.moe = SparseMoe(32, 16, num_experts=3, top_k=2, activation="silu", normalize=True, context=context)
    generator = torch.Generator().manual_seed(0)
    targets = weight_targets(layer)
    for name, target in targets.items():
        if name.endswith("input_scale"):
            target.load(torch.rand(1, generator=generator) * 0.01 + 0.005)
        elif name.endswith("weight_scale"):
            target.load(torch.rand(1, generator=generator) * 0.1)
        else:
            target.load(torch.randn(target.shape, generator=generator))
    given = {name: target.destination.clone() for name, target in targets.items() if name.endswith("input_scale")}
    finalize_weights(layer)
    experts = layer.moe.experts.method
    assert isinstance(experts, CheckpointFp8Experts)
    weights = experts._weights
    assert weights is not None and weights.input_scales is not None
    largest = [
        max(float(scale) for name, scale in given.items() if ("down_proj" in name) == is_down)
        for is_down in (False, True)
    ]
    assert [float(scale) for scale in weights.input_scales] == largest
    x = torch.randn(7, 32, generator=generator)
    routing = layer.moe.gate(x)
    expected = run_experts_reference(x, routing, weights)
    assert relative_error(layer.moe(x), expected) < 5e-3
    without = run_experts_reference(x, routing, dataclasses.replace(weights, input_scales=None))
    assert relative_error(without, expected) > 0.01


def test_blocks_must_end_where_projections_do() -> None:
    linear, _ = methods_for(None, Fp8Format(weight_scales="block", scale_name="weight_scale_inv"))
    context = LayerContext(dtype=torch.float32, device=CPU, backend=select_backend("auto", CPU), linear_method=linear)
    layer = torch.nn.Module()
    layer.gate_up_proj = MergedColumnLinear(128, {"gate_proj": 192, "up_proj": 192}, bias=False, context=context)
    assert isinstance(layer.gate_up_proj.method, BlockFp8Linear)
    with pytest.raises(UnsupportedFeatureError, match="gate_proj"):
        weight_targets(layer)


def test_block_scaled_product() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, 300, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3, generator=generator)
    weight = BlockScaledWeight.of(values, scales)
    factors = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    x, bias = torch.randn(5, 300, generator=generator), torch.randn(200, generator=generator)
    exact = x.double() @ (values.double() * factors).T + bias
    assert relative_error(block_scaled_linear(x[:1], weight, bias), exact[:1]) < 1e-5
    assert 1e-4 < relative_error(block_scaled_linear(x, weight, bias), exact) < 0.04
    assert block_scaled_linear(x[:0], weight, None).shape == (0, 200)


def test_a_missing_scale_is_named(tmp_path: Path) -> None:
    written = write_fp8_model(tmp_path, "block", "qwen3")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        load(written.folder)


def test_float8_without_a_word_about_it_is_refused(tmp_path: Path) -> None:
    written = write_fp8_model(tmp_path, "matrix", "qwen3")
    (tmp_path / "config.json").write_text(json.dumps(written.hf_config, default=str))
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        load(written.folder)


def test_model_optimizer_may_write_its_configuration_apart(tmp_path: Path) -> None:
    written: Fp8Model = write_fp8_model(tmp_path, "modelopt", "qwen3")
    (tmp_path / "config.json").write_text(json.dumps(written.hf_config, default=str))
    entries = {key: value for key, value in FORMATS["modelopt"].items() if key != "quant_method"}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": entries}))
    assert open_checkpoint(tmp_path).quantization == "modelopt"
    token = random_tokens(1)
    model, exact = load(tmp_path), build_model(written.hf_config, written.exact)
    actual = all_logits(model, sequences_for(model), [("a", token)])
    assert relative_error(actual, all_logits(exact, sequences_for(exact), [("a", token)])) < 1e-4
