"""Engines of models with experts: formats, values, and where they cannot be built."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builder.test_build import hf_logits, logits_of
from tests.support.changed_checkpoints import ROWS
from tests.support.tiny_models import random_tokens, tiny_hf_model
from tokenmill.builder.build import build
from tokenmill.errors import UnsupportedFeatureError


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


def test_experts_are_refused_for_a_cpu(tmp_path: Path) -> None:
    tiny_hf_model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedFeatureError, match="experts") as raised:
        build(tmp_path, device="cpu")
    assert raised.value.field == "device"
