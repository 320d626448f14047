"""Engines of models with experts: the formats of their weights, and the values."""

from __future__ import annotations

from pathlib import Path

from tests.builder.test_build import hf_logits, logits_of
from tests.checkpoints.gguf_files import EXPERTS, EXPERTS_METADATA, tiny_model, write_model
from tests.support.changed_checkpoints import ROWS
from tests.support.tiny_models import random_tokens, relative_error, tiny_hf_model
from tokenmill.builder.build import build
from tokenmill.builder.engine import Engine
from tokenmill.checkpoints.base import open_checkpoint
from tokenmill.program.program import Weight
from tokenmill.program.weight_file import Bytes
from tokenmill.runtime.weight_decoding import decode_weight


def test_experts_are_quantized_and_their_router_is_not(tmp_path: Path) -> None:
    hf_model = tiny_hf_model("mixtral")
    hf_model.save_pretrained(tmp_path)
    engine = build(tmp_path, quantization="int8", **ROWS)
    formats = {weight.name: weight.format for weight in engine.program.weights if len(weight.shape) == 2}
    routers = {name for name in formats if name.endswith(".gate.weight")}
    assert len(routers) == 3
    assert {formats[name] for name in routers} == {"float32"}
    assert {formats[name] for name in formats if ".experts." in name} == {"int8_group32"}
    tokens = random_tokens(40)
    expected = hf_logits(hf_model, tokens)
    errors = (logits_of(engine, tokens) - expected).abs().amax(dim=1) / expected.abs().max()
    assert 1e-4 < errors.median().item() < 0.1  # a token that was near the edge between experts is far off


def test_experts_of_two_formats_in_one_weight_are_converted(tmp_path: Path) -> None:
    """Gate and up of a layer lie in one weight; a file may hold them in different types."""
    path = tmp_path / "model.gguf"
    model = tiny_model("qwen3_moe", norm_topk_prob=True, **EXPERTS)
    kinds = {"ffn_gate_exps": "Q4_0", "ffn_up_exps": "Q8_0", "ffn_down_exps": "Q5_0"}
    write_model(path, model, kinds=kinds, **EXPERTS_METADATA)
    engine = build(path, **ROWS)
    formats = {weight.name.rpartition(".")[2]: weight.format for weight in engine.program.weights}
    assert formats["gate_up_proj"] == "int8_group32"
    assert formats["down_proj"] == "q5_0"
    assert engine.config.report["notices"] == [
        "16 tensors of experts that are partly q4_0 and partly q8_0: stored as int8_group32"
    ]
    exact = [tensor.load() for tensor in open_checkpoint(path).tensors() if "experts.gate_proj" in tensor.name]
    found = decode_weight(*of_name(engine, "model.layers.0.mlp.experts.gate_up_proj")).view(4, 2, 64, 64)[:, 0]
    assert relative_error(found, exact[0]) < 0.01


def of_name(engine: Engine, name: str) -> tuple[Weight, Bytes]:
    """A weight and its bytes."""
    return next(weight for weight in engine.program.weights if weight.name == name), engine.weights[name]
