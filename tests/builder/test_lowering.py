"""Lowering: views cost nothing, outputs land where they belong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.programs import captured, tiny_model
from tokenmill.builder.graph import Graph, Node, Value
from tokenmill.builder.lowering import OUTPUT, lower, program_text
from tokenmill.builder.passes import PASSES, run_passes
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.program.program import Operand, Weight

PASS_NAMES = [one.name for one in PASSES]


def test_without_passes_projections_are_written_side_by_side() -> None:
    program = lower(captured(tiny_model("llama")))
    assert "copy" not in {operation.kind for operation in program.operations}
    found = {
        one.name: one.outputs["y"] for one in program.operations if "layers.0.self_attn" in one.name and one.outputs
    }
    buffer = "model.layers.0.self_attn.qkv_proj"
    assert found[f"{buffer.removesuffix('qkv_proj')}k_proj"] == Operand(buffer, 96, 32)
    assert found[f"{buffer.removesuffix('qkv_proj')}v_proj"] == Operand(buffer, 128, 32)


def test_with_passes_the_parts_of_a_merged_product_are_columns() -> None:
    program = lower(run_passes(captured(tiny_model("llama")))[0])
    (write,) = [one for one in program.operations if one.name == "model.layers.1.self_attn.rope_write_cache"]
    buffer = "model.layers.1.self_attn.qkv_proj"
    assert [write.inputs[role] for role in ("query", "key", "value")] == [
        Operand(buffer, 0, 96), Operand(buffer, 96, 32), Operand(buffer, 128, 32),
    ]  # fmt: skip


def test_the_last_operation_writes_the_logits() -> None:
    for disabled in ([], PASS_NAMES):
        program = lower(run_passes(captured(tiny_model("gemma3")), disabled=disabled)[0])
        assert program.operations[-1].outputs["y"] == Operand(OUTPUT, 0, 61)
        assert (program.output.rows, program.output.columns) == ("rows", 61)


def test_weights_are_those_that_are_used_once_each() -> None:
    for name in ("llama_tied_biases", "gemma3"):
        for disabled in ([], PASS_NAMES):
            program = lower(run_passes(captured(tiny_model(name)), disabled=disabled)[0])
            names = [weight.name for weight in program.weights]
            used = {name for operation in program.operations for name in operation.weights.values()}
            assert len(names) == len(set(names))
            assert set(names) == used


def test_parts_that_live_elsewhere_are_copied() -> None:
    x, doubled = Value("x", "tokens", 4), Value("d", "tokens", 4)
    views = {
        "half": Node(
            "slice", "half", {"x": "d"}, {"y": Value("half", "tokens", 2)}, {}, {"first_column": 2, "num_columns": 2}
        ),
        "both": Node("concat", "both", {"x0": "half", "x1": "d", "x2": "x"}, {"y": Value("both", "tokens", 10)}),
    }
    scale = Node("scale", "d", {"x": "x"}, {"y": doubled}, {}, {"factor": 2.0})
    program = lower(Graph((x,), "both", (scale, *views.values()), {}))
    copies = {one.name: (one.inputs["x"], one.outputs["y"]) for one in program.operations if one.kind == "copy"}
    assert copies == {
        "both.x0": (Operand(OUTPUT, 4, 2), Operand(OUTPUT, 0, 2)),
        "both.x2": (Operand("x", 0, 4), Operand(OUTPUT, 6, 4)),
    }
    assert program.operations[0].outputs["y"] == Operand(OUTPUT, 2, 4)


def test_an_output_that_is_a_view_is_copied() -> None:
    x = Value("x", "rows", 4)
    view = Node("slice", "half", {"x": "x"}, {"y": Value("half", "rows", 2)}, {}, {"first_column": 2, "num_columns": 2})
    program = lower(Graph((x,), "half", (view,), {}))
    (copy,) = program.operations
    assert (copy.inputs["x"], copy.outputs["y"]) == (Operand("x", 2, 2), Operand(OUTPUT, 0, 2))


def test_weights_that_no_program_can_store_are_refused() -> None:
    graph = captured(tiny_model("gemma3"))
    (first, *_) = graph.nodes_of_kind("offset_weight")
    spoiled = tuple(replace(one, attributes={"offset": 2.0}) if one is first else one for one in graph.nodes)
    with pytest.raises(UnsupportedFeatureError, match=r"adds 2\.0 to a weight"):
        lower(replace(graph, nodes=spoiled))


def test_text_names_buffers_and_columns() -> None:
    program = lower(run_passes(captured(tiny_model("llama")))[0])
    assert (
        "%model.layers.0.self_attn.attention[0:96] = attention(query=%model.layers.0.self_attn.rope.0[0:96], layer=0, "
        "num_heads=6, num_kv_heads=2, head_dim=16, scale=0.25)"
    ) in program_text(program).splitlines()


def test_constants_keep_their_format() -> None:
    program = lower(captured(tiny_model("llama")))
    (frequencies,) = [weight for weight in program.weights if not weight.parts]
    assert frequencies == Weight("model.rotation.frequencies", (8,))
