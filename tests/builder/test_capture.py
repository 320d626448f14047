"""Capture: both ways of recording agree, weights carry the checkpoint's names, what programs cannot do is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.programs import ARCHITECTURES, captured, tensors_of, tiny_model
from tests.support.tiny_models import TINY_SIZES, tiny_hf_config
from tokenmill.builder.capture import capture, parameters_of
from tokenmill.builder.importer import Parameter, import_recording
from tokenmill.builder.recording import Call, RecordedTensor, Recording, capture_context, export, record
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.layers.forward_batch import ForwardBatch
from tokenmill.layers.rope import inverse_frequencies
from tokenmill.layers.rope_config import RopeConfig
from tokenmill.models import load_model_class
from tokenmill.models.base import CausalLM
from tokenmill.models.config import ModelConfig
from tokenmill.models.llama import LlamaForCausalLM
from tokenmill.program.program import WeightPart


@pytest.mark.spec("D1")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_export_and_dispatch_give_the_same_graph(name: str) -> None:
    model = meta_model(tiny_model(name))
    exported, recorded = (import_recording(way(model), parameters_of(model)) for way in (export, record))
    assert exported.text() == recorded.text()
    assert exported == recorded


def meta_model(hf_model: Any) -> CausalLM:
    """tokenmill's model of the same configuration, without values."""
    config = ModelConfig.from_hf(hf_model.config.to_dict())
    return load_model_class(config.model_type)(config, capture_context(torch.float32))


class LooksAtTheNumberOfTokens(LlamaForCausalLM):
    """Scales its hidden states in long steps."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        hidden = super().forward(batch)
        return hidden * 2.0 if batch.input_ids.shape[0] > 100 else hidden


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[CausalLM]:
    """The models that were exported."""
    found: list[CausalLM] = []

    def counted(model: CausalLM) -> Recording:
        found.append(model)
        return export(model)

    monkeypatch.setattr("tokenmill.builder.capture.export", counted)
    return found


def test_a_model_that_looks_at_the_number_of_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.builder.capture.load_model_class", lambda model_type: LooksAtTheNumberOfTokens)
    with pytest.raises(UnsupportedFeatureError, match=r"torch\.export: Constraints violated") as raised:
        captured(tiny_model("llama"), "export")
    assert raised.value.field == "model"


def test_a_difference_between_the_two_ways_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    other = meta_model(tiny_model("llama_yarn"))
    monkeypatch.setattr("tokenmill.builder.capture.export", lambda model: record(other))
    with pytest.raises(UnsupportedFeatureError, match=r"the first difference is: -%model\.rotation"):
        captured(tiny_model("llama"), "export")


def test_what_was_proved_is_not_proved_again(tmp_path: Path, exports: list[CausalLM]) -> None:
    configs = [ModelConfig.from_hf(tiny_model(name).config.to_dict()) for name in ("llama", "qwen2")]
    folder = tmp_path / "captures"
    first = capture(configs[0], proofs=folder)
    assert (len(exports), len(list(folder.iterdir()))) == (1, 1)
    assert capture(configs[0], proofs=folder) == first
    assert len(exports) == 1
    capture(configs[1], proofs=folder)  # another graph
    capture(configs[0])  # no folder
    assert (len(exports), len(list(folder.iterdir()))) == (3, 2)


def test_a_folder_that_cannot_be_written_does_not_matter(tmp_path: Path, exports: list[CausalLM]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    config = ModelConfig.from_hf(tiny_model("llama").config.to_dict())
    for _ in range(2):
        capture(config, proofs=file / "captures")
    assert len(exports) == 2


def test_another_torch_is_asked_again(tmp_path: Path, exports: list[CausalLM], monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_hf(tiny_model("llama").config.to_dict())
    capture(config, proofs=tmp_path)
    monkeypatch.setattr(torch, "__version__", "9.9")
    capture(config, proofs=tmp_path)
    assert len(exports) == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_of_the_checkpoint_is_a_weight_of_its_own(name: str) -> None:
    hf_model = tiny_model(name)
    graph = captured(hf_model)
    parts = [part for weight in graph.weights.values() for part in weight.parts]
    tensors = tensors_of(hf_model)
    assert {part.name: part.num_rows for part in parts} == {one: tensor.shape[0] for one, tensor in tensors.items()}
    stacks = {name for node in graph.nodes_of_kind("experts") for name in node.weights.values()}
    several = {weight.name for weight in graph.weights.values() if len(weight.parts) > 1}
    assert several == stacks


def test_rows_of_values_are_symbols() -> None:
    graph = captured(tiny_model("llama"))
    assert {value.rows for value in graph.values().values()} == {"tokens", "rows"}
    assert graph.values()[graph.output].rows == "rows"
    assert graph.values()[graph.output].columns == TINY_SIZES["vocab_size"]


def test_rotations_of_two_kinds_have_their_own_frequencies() -> None:
    graph = captured(tiny_model("gemma3"))
    full, local = graph.constants.values()
    assert full == tuple(inverse_frequencies(RopeConfig(theta=1e6), 16).tolist())
    assert local == tuple(inverse_frequencies(RopeConfig(theta=1e4), 16).tolist())
    used = {int(str(node.name).split(".")[2]): node.inputs["rotation"] for node in graph.nodes_of_kind("rope")}
    assert used == {0: "model.rotation_1", 1: "model.rotation", 2: "model.rotation_1"}


def test_attention_carries_what_differs_between_layers() -> None:
    graph = captured(tiny_model("gemma3"))
    found = [
        (node.attributes["layer"], node.attributes.get("sliding_window")) for node in graph.nodes_of_kind("attention")
    ]
    assert found == [(0, 7), (1, None), (2, 7)]
    assert [node.attributes["layer"] for node in graph.nodes_of_kind("write_cache")] == [0, 1, 2]


def test_constants_are_rounded_to_the_type_of_the_model() -> None:
    config = ModelConfig.from_hf(tiny_hf_config("gemma3_text", hidden_size=640, num_attention_heads=8).to_dict())
    scales = {
        dtype: [
            node.attributes["factor"] for node in capture(config, dtype=dtype, method="dispatch").nodes_of_kind("scale")
        ]
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert scales == {torch.float32: [pytest.approx(640**0.5, rel=1e-6)], torch.bfloat16: [25.25]}


def recording_of(operator: str, *arguments: Any, output: tuple[Any, ...] = ("tokens", 8)) -> Recording:
    """Token ids looked up in a table, then one call of which `x` in `arguments` is the result."""
    token_ids, table, x, result = (RecordedTensor(shape) for shape in (("tokens",), (61, 8), ("tokens", 8), output))
    recording = Recording({token_ids: "token_ids"}, {table: "table.weight"}, output=result)
    recording.calls.append(Call("aten.embedding.default", (table, token_ids), (x,), "model.embed_tokens"))
    given = tuple(x if argument == "x" else argument for argument in arguments)
    recording.calls.append(Call(operator, given, (result,), "model.layers.3"))
    return recording


PARAMETERS = {"table.weight": Parameter((61, 8), (WeightPart("table.weight", 61),))}


@pytest.mark.parametrize(
    ("recording", "complaint"),
    [
        (recording_of("aten.softmax.int", "x", 1), "aten.softmax.int"),
        (recording_of("aten.slice.Tensor", "x", 0, 1, 3, output=(2, 8)), "along dimension 0"),
        (recording_of("aten.slice.Tensor", "x", 1, 0, 8, 2, output=("tokens", 4)), "along dimension 1"),
        (recording_of("aten.view.default", "x", [-1, 4], output=(14, 4)), "to \\(14, 4\\)"),
        (recording_of("aten.index_select.default", "x", 1, "x"), "along dimension 1"),
        (recording_of("aten.mul.Tensor", RecordedTensor((3,)), 2.0), "no activation"),
    ],
)
def test_what_a_program_cannot_do_is_refused(recording: Recording, complaint: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=complaint) as raised:
        import_recording(recording, PARAMETERS)
    assert "model.layers.3" in str(raised.value)


def test_a_call_that_is_known_is_taken() -> None:
    graph = import_recording(recording_of("aten.mul.Tensor", "x", 2.0), PARAMETERS)
    graph.check()
    assert [node.kind for node in graph.nodes] == ["embedding", "scale"]
