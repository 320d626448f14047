"""What each pass leaves of a model: kinds of nodes, names, formats; and how passes are chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import pytest
import torch

from tests.support.programs import ARCHITECTURES, captured, empty_cache, program_logits, program_weights, tiny_model
from tests.support.tiny_models import random_tokens, relative_error
from tokenmill.builder.graph import Graph, Node, Value, assign_formats
from tokenmill.builder.lowering import lower
from tokenmill.builder.memory_plan import plan_memory
from tokenmill.builder.passes import PASSES, Target, run_passes
from tokenmill.errors import InvalidParameterError
from tokenmill.program.program import Weight, WeightPart

PASS_NAMES = [one.name for one in PASSES]
INT8 = Target(int8_activation_formats=frozenset({"q8_0"}))


def quantized(graph: Graph, format_name: str = "q8_0") -> Graph:
    """All matrices in a quantized format, but those that choose experts."""
    parts = [part for weight in graph.weights.values() if len(weight.shape) == 2 for part in weight.parts]
    parts = [part for part in parts if not part.name.endswith(".gate.weight")]
    return assign_formats(graph, {part.name: format_name for part in parts})


def kinds(graph: Graph) -> Counter[str]:
    return Counter(node.kind for node in graph.nodes if node.kind != "slice")


def only(*names: str) -> list[str]:
    """All passes but these."""
    return [name for name in PASS_NAMES if name not in names]


@pytest.mark.spec("D2")
def test_llama_becomes_few_operations() -> None:
    """Per layer: norm, qkv, rope and cache, attention, output product, norm, gate and up, down product."""
    graph, _ = run_passes(captured(tiny_model("llama")))
    assert kinds(graph) == {
        "embedding": 1, "rotation": 1, "select_rows": 2, "rms_norm": 7, "linear": 13, "rope_write_cache": 3,
        "attention": 3,
    }  # fmt: skip


def test_quantized_llama_quantizes_only_what_attention_gives_by_itself() -> None:
    graph, _ = run_passes(quantized(captured(tiny_model("llama"))), target=INT8)
    assert kinds(graph)["quantize"] == 3
    assert {node.inputs["x"].rpartition(".")[2] for node in graph.nodes_of_kind("quantize")} == {
        "attention",
        "selected",
    }
    values = graph.values()
    assert {values[node.inputs["x"]].dtype for node in graph.nodes_of_kind("linear")} == {"int8_group32"}


def test_gemma_adds_in_the_norm_and_folds_its_constants() -> None:
    graph, _ = run_passes(captured(tiny_model("gemma3")))
    found = kinds(graph)
    assert (found["add_rms_norm"], found["add"], found["offset_weight"], found["scale"]) == (6, 0, 0, 0)
    assert {weight.transform for weight in graph.weights.values() if "norm" in weight.name} == {"add_one"}
    (embedding,) = graph.nodes_of_kind("embedding")
    assert embedding.attributes["scale"] == pytest.approx(48**0.5)


def test_norms_of_heads_are_part_of_the_write_to_the_cache() -> None:
    graph, _ = run_passes(captured(tiny_model("qwen3")))
    weights = [set(node.weights) for node in graph.nodes_of_kind("rope_write_cache")]
    assert weights == [{"query_norm", "key_norm"}] * 3


def test_merged_weights_name_their_parts_in_order() -> None:
    graph, _ = run_passes(captured(tiny_model("llama_tied_biases")))
    weight = graph.weights["model.layers.1.self_attn.qkv_proj.weight"]
    prefix = "model.layers.1.self_attn."
    assert [(part.name, part.num_rows) for part in weight.parts] == [
        (f"{prefix}q_proj.weight", 96), (f"{prefix}k_proj.weight", 32), (f"{prefix}v_proj.weight", 32),
    ]  # fmt: skip
    assert weight.shape == (160, 48)
    bias = graph.weights["model.layers.1.mlp.gate_up_proj.bias"]
    assert [part.name for part in bias.parts] == [
        "model.layers.1.mlp.gate_proj.bias",
        "model.layers.1.mlp.up_proj.bias",
    ]


@pytest.mark.parametrize(
    ("different", "expected"),
    [
        ("v_proj", ["qk_proj", "v_proj"]),
        ("q_proj", ["kv_proj", "q_proj"]),
        ("k_proj", ["k_proj", "q_proj", "v_proj"]),
        (None, ["qkv_proj"]),
    ],
)
def test_only_weights_of_one_format_are_merged(different: str | None, expected: list[str]) -> None:
    graph = quantized(captured(tiny_model("llama")))
    if different is not None:
        graph = assign_formats(graph, {f"model.layers.1.self_attn.{different}.weight": "q6_k"})
    graph, _ = run_passes(graph)
    found = sorted(
        node.name.rpartition(".")[2] for node in graph.nodes_of_kind("linear") if "layers.1.self" in node.name
    )
    assert found == sorted([*expected, "o_proj"])


def test_a_part_that_is_read_before_the_others_are_computed_may_be_merged() -> None:
    """Value first, then the query: the merged product stands where the first of its parts stood."""
    x, heads = Value("x", "tokens", 8), {"head_dim": 4}
    weights = {name: Weight(f"{name}_proj.weight", (8, 8), parts=(WeightPart(name, 8),)) for name in "qkv"}
    products = {
        name: Node("linear", f"{name}_proj", {"x": "x"}, {"y": Value(name, "tokens", 8)}, {"weight": weight.name})
        for name, weight in weights.items()
    }
    norm = Node("rms_norm", "norm", {"x": "v"}, {"y": Value("n", "tokens", 8)}, {"weight": "w"}, {"eps": 1e-5, **heads})
    write = Node("write_cache", "write", {"key": "k", "value": "n"}, attributes={"layer": 0})
    sizes = {"layer": 0, "num_heads": 2, "num_kv_heads": 2, "scale": 1.0, **heads}
    attention = Node("attention", "attention", {"query": "q"}, {"y": Value("y", "tokens", 8)}, {}, sizes)
    nodes = (products["v"], norm, products["k"], write, products["q"], attention)
    by_name = {weight.name: weight for weight in (*weights.values(), Weight("w", (4,)))}
    merged, _ = run_passes(Graph((x,), "y", nodes, by_name), disabled=only("merge_qkv"))
    assert [node.name for node in merged.nodes if node.kind != "slice"] == ["qkv_proj", "norm", "write", "attention"]
    assert [part.name for part in merged.weights["qkv_proj.weight"].parts] == ["q", "k", "v"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_rounding_with_and_without_fused_quantization(name: str) -> None:
    """Quantized in a pass of its own or in the pass before: the same integers, so the same logits."""
    hf_model = tiny_model(name)
    graph = quantized(captured(hf_model))
    token_ids = random_tokens(12)
    found = {}
    for disabled in ((), ("fuse_norm_quantize", "fuse_activation_quantize"), ("quantize_activations",)):
        program = plan_memory(lower(run_passes(graph, disabled=disabled, target=INT8)[0]), max_tokens=16, max_rows=16)
        weights = program_weights(program, graph, hf_model)
        found[disabled] = program_logits(program, weights, empty_cache(hf_model), [("a", token_ids)])
    fused, apart, exact = found.values()
    assert relative_error(fused, apart) < 1e-5
    assert 1e-4 < relative_error(fused, exact) < 0.1


@pytest.mark.parametrize("name", PASS_NAMES)
def test_every_pass_changes_some_model_and_says_what(name: str) -> None:
    for architecture in ("llama_tied_biases", "qwen3", "gemma3"):
        graph = quantized(captured(tiny_model(architecture)))
        # The sum of stream and product goes to whichever of two passes comes first.
        disabled = ["fuse_residual"] if name == "fuse_add_norm" else []
        (report,) = [one for one in run_passes(graph, disabled=disabled, target=INT8)[1] if one.name == name]
        assert bool(report.changes) == bool(report.diff()), (architecture, report.changes)
        if report.changes:
            return
    pytest.fail("no model is changed")


@pytest.mark.parametrize("name", PASS_NAMES)
def test_a_second_run_of_a_pass_changes_nothing(name: str) -> None:
    (one,) = [one for one in PASSES if one.name == name]
    graph = quantized(captured(tiny_model("gemma3")))
    for before in PASSES[: PASSES.index(one) + 1]:
        graph, _ = before.function(graph, INT8)
    again, changes = one.function(graph, INT8)
    assert (again.text(), changes) == (graph.text(), [])


def test_graphs_stay_sound_after_each_pass() -> None:
    for architecture in ARCHITECTURES:
        for report in run_passes(quantized(captured(tiny_model(architecture))), target=INT8)[1]:
            report.after.check()


@pytest.mark.parametrize("disabled", [["merge_gate_up"], ["simplify_views"], PASS_NAMES])
def test_disabled_passes_are_not_run(disabled: Collection[str]) -> None:
    _, reports = run_passes(captured(tiny_model("llama")), disabled=disabled)
    assert [report.name for report in reports] == [name for name in PASS_NAMES if name not in disabled]


def test_an_unknown_pass_is_refused_with_a_guess() -> None:
    with pytest.raises(InvalidParameterError, match="merge_qkw") as raised:
        run_passes(captured(tiny_model("llama")), disabled=["merge_qkw"])
    assert raised.value.field == "disabled_passes"
    assert "merge_qkv" in str(raised.value)


def test_values_that_others_read_are_not_fused_away() -> None:
    """The logits of a debug output: a gated activation that something else reads stays a node of its own."""
    graph, _ = run_passes(captured(tiny_model("llama")), disabled=only("merge_gate_up", "simplify_views"))
    (first, *_) = graph.nodes_of_kind("gated_activation")
    read_twice = Graph(
        graph.inputs, first.inputs["gate"], tuple(graph.nodes[: graph.nodes.index(first) + 1]), graph.weights,
        graph.constants,
    )  # fmt: skip
    kept, _ = run_passes(read_twice, disabled=only("fuse_gated_activation"))
    assert kinds(kept)["gated_activation"] == 1


def test_one_rounding_step_is_a_127th_of_the_largest_value_of_its_group() -> None:
    from tokenmill.program.reference import round_to_int8

    x = torch.zeros(1, 40)
    x[0, 3], x[0, 5], x[0, 35] = 127.0, 1.4, 0.02
    assert round_to_int8(x)[0, [3, 5, 35]].tolist() == pytest.approx([127.0, 1.0, 0.02])
