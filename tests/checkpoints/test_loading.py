"""Loading into targets: everything consumed, everything filled, or one error with the whole picture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints.gguf_files import tiny_model, write_model
from tokenmill.checkpoints.base import Checkpoint, open_checkpoint
from tokenmill.checkpoints.loading import fill_dummy, load_weights
from tokenmill.errors import CheckpointError
from tokenmill.layers.weights import WeightTarget


def checkpoint_of(directory: Path, **tensors: torch.Tensor) -> Checkpoint:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(tensors, directory / "model.safetensors")
    return open_checkpoint(directory)


def test_every_target_is_filled_and_progress_told(tmp_path: Path) -> None:
    a, b = torch.randn(4, 3), torch.randn(5, dtype=torch.float64)
    checkpoint = checkpoint_of(tmp_path, a=a, b=b)
    merged = torch.zeros(6, 3, dtype=torch.bfloat16)
    vector = torch.zeros(5)
    told: list[tuple[str, int, int]] = []
    load_weights(
        {"a": WeightTarget(merged[2:]), "b": WeightTarget(vector)},
        checkpoint,
        on_progress=lambda *progress: told.append(progress),
    )
    assert torch.equal(merged, torch.cat([torch.zeros(2, 3), a]).bfloat16())
    assert torch.equal(vector, b.float())
    assert [name for name, _, _ in told] == ["a", "b"]
    assert [(done, total) for _, done, total in told] == [(48, 88), (88, 88)]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_a_gguf_file_fills_a_model(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type)
    write_model(tmp_path / "model.gguf", model)
    other = type(model)(model.config)
    targets = {name: WeightTarget(parameter.data) for name, parameter in other.named_parameters()}
    load_weights(targets, open_checkpoint(tmp_path / "model.gguf"))
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=0, atol=1e-6)


def test_missing_unexpected_and_misshapen_are_told_together(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, a=torch.ones(2), b=torch.ones(3, 4), extra=torch.ones(7))
    before = torch.zeros(2)
    targets = {
        "a": WeightTarget(before),
        "b": WeightTarget(torch.zeros(4, 3)),
        "absent": WeightTarget(torch.zeros(1, 2)),
    }
    with pytest.raises(CheckpointError) as caught:
        load_weights(targets, checkpoint)
    text = str(caught.value)
    assert "1 tensor missing: absent [1, 2]" in text
    assert "1 tensor unexpected: extra [7]" in text
    assert "1 tensor of another shape: b is [3, 4], expected [4, 3]" in text
    assert str(tmp_path) in text
    assert "llama" in text
    assert caught.value.field == "model"
    assert torch.equal(before, torch.zeros(2))  # nothing is loaded from a checkpoint that does not fit


def test_long_lists_are_cut(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, **{f"t{index}": torch.ones(1) for index in range(8)})
    with pytest.raises(CheckpointError, match=r"8 tensors unexpected: t0 \[1\], .*t4 \[1\] and 3 more"):
        load_weights({}, checkpoint)


def test_a_shape_that_would_broadcast_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a is \[1\], expected \[4\]"):
        load_weights({"a": WeightTarget(torch.zeros(4))}, checkpoint_of(tmp_path, a=torch.ones(1)))


def test_ignored_tensors_may_be_there_and_are_loaded_if_wanted(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, **{"lm_head.weight": torch.ones(2), "lm_head.weight_scale": torch.ones(1)})
    head = torch.zeros(2)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight_scale"):  # a pattern matches the whole name
        load_weights({}, checkpoint, ignore=[re.compile(r"lm_head\.weight")])
    patterns = [re.compile(r"lm_head\..*")]
    load_weights({}, checkpoint, ignore=patterns)
    load_weights({"lm_head.weight": WeightTarget(head)}, checkpoint, ignore=patterns)
    assert torch.equal(head, torch.ones(2))


def dummy_targets(dtype: torch.dtype) -> dict[str, WeightTarget]:
    return {
        "model.layers.0.mlp.up_proj.weight": WeightTarget(torch.zeros(256, 256, dtype=dtype)),
        "model.layers.0.input_layernorm.weight": WeightTarget(torch.zeros(4096, dtype=dtype)),
        "model.layers.0.self_attn.q_norm.weight": WeightTarget(torch.zeros(4096, dtype=dtype)),
        "model.layers.0.self_attn.q_proj.bias": WeightTarget(torch.zeros(4096, dtype=dtype)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_dummy_weights_have_a_sensible_scale(dtype: torch.dtype) -> None:
    targets = dummy_targets(dtype)
    fill_dummy(targets, seed=0)
    matrix, norm, head_norm, bias = (target.destination.float() for target in targets.values())
    assert matrix.std().item() == pytest.approx(0.02, rel=0.1)
    assert matrix.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert bias.std().item() == pytest.approx(0.02, rel=0.1)
    for values in (norm, head_norm):
        assert values.mean().item() == pytest.approx(1.0, abs=0.01)
        assert values.std().item() < 0.05


def test_dummy_weights_follow_their_seed() -> None:
    first, same, other = (dummy_targets(torch.float32) for _ in range(3))
    fill_dummy(first, seed=1)
    fill_dummy(same, seed=1)
    fill_dummy(other, seed=2)
    for name, target in first.items():
        assert torch.equal(target.destination, same[name].destination)
        assert not torch.equal(target.destination, other[name].destination)


def test_dummy_weights_fill_only_their_view() -> None:
    merged = torch.zeros(4, 8)
    fill_dummy({"a.weight": WeightTarget(merged[2:])}, seed=0)
    assert torch.equal(merged[:2], torch.zeros(2, 8))
    assert (merged[2:] != 0).all()
