"""Costs from a configuration are those of the program that the builder makes of the model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.models.test_logits import CASES
from tests.support.tiny_models import tiny_hf_model
from tokenmill.builder.build import build
from tokenmill.models.config import ModelConfig
from tokenmill.models.step_costs import linear_order, linear_shapes, step_costs
from tokenmill.program.costs import Cost, StepSize, operation_rows

STEP = StepSize(num_tokens=8, num_rows=8, num_sequences=2, context_len=50, cache_nbytes=2)


@pytest.mark.parametrize("num_rows", [8, 2])
@pytest.mark.parametrize("case", ["llama", "gemma3", "qwen3", "mixtral", "qwen3_moe_some_layers"])
def test_weights_and_operations_are_those_of_the_program(case: str, num_rows: int, tmp_path: Path) -> None:
    """Also where few tokens are wanted, and where the last layer is dense among layers with experts."""
    hf_type, changes = next(options for name, options in CASES.items() if name.startswith(case))
    step = replace(STEP, num_rows=num_rows)
    hf_model = tiny_hf_model(hf_type, **changes)
    hf_model.save_pretrained(tmp_path)
    options: dict[str, Any] = {"dtype": "bfloat16", "capture": "dispatch", "max_seq_len": 64}
    program = build(tmp_path, device="cuda", **options).program
    config = ModelConfig.from_hf(hf_model.config.to_dict())
    sizes = {weight.name: math.prod(weight.shape) for weight in program.weights}
    # Routers are float32 here, of which step costs count 2 bytes; biases, 4 bytes each, are left out.
    uncounted = sum(2 * size for name, size in sizes.items() if name.endswith("mlp.gate.weight"))
    uncounted += sum(4 * size for name, size in sizes.items() if name.endswith(".bias"))
    for kinds, own in (
        (("linear",), ("linear", "head")),
        (("attention",), ("attention",)),
        (("experts",), ("experts",)),
    ):
        expected = sum((row.cost for row in operation_rows(program, step) if row.kind in kinds), Cost())
        found = sum((one.cost for one in step_costs(config, step) if one.kind in own), Cost())
        assert found.flops == expected.flops, kinds
        assert found.weight_bytes == expected.weight_bytes - (uncounted if "linear" in kinds else 0), kinds


@pytest.mark.parametrize(("case", "norms_behind"), [("llama", 1), ("gemma3", 3)])
def test_norms_and_activations_behind_the_last_attention_are_of_the_wanted_tokens(case: str, norms_behind: int) -> None:
    """A program has them inside its products."""
    hf_type, changes = next(options for name, options in CASES.items() if name.startswith(case))
    config = ModelConfig.from_hf(tiny_hf_model(hf_type, **changes).config.to_dict())
    few = {one.name: one for one in step_costs(config, replace(STEP, num_rows=2))}
    for name, behind in (("norms", norms_behind), ("activation", 1)):
        one = few[name]
        whole = next(other for other in step_costs(config, STEP) if other.name == name)
        per_token = whole.cost.flops // (STEP.num_tokens * whole.count)
        assert one.cost.flops == per_token * ((one.count - behind) * STEP.num_tokens + behind * 2), name
        assert one.count == whole.count


def test_the_order_names_every_layer() -> None:
    for name in ("llama", "mixtral"):
        hf_type, changes = next(case for case_name, case in CASES.items() if case_name.startswith(name))
        config = ModelConfig.from_hf(tiny_hf_model(hf_type, **changes).config.to_dict())
        order = linear_order(config)
        assert order[-1] == "lm_head"
        assert {shape.name: shape.count for shape in linear_shapes(config)} == {one: order.count(one) for one in order}
