"""Scales of a float8 cache: read from checkpoints, used when keys and values are written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.paged_cache import PagedSequences
from tests.support.tiny_checkpoint import write_tiny_model
from tokenmill.attention.reference import ReferenceAttention
from tokenmill.attention.select import select_backend
from tokenmill.checkpoints.base import open_checkpoint
from tokenmill.config import LlmArgs
from tokenmill.errors import CheckpointError, UnsupportedFeatureError
from tokenmill.layers.attention import Attention
from tokenmill.models.config import ModelConfig
from tokenmill.runtime.model_loader import load_cache_scales, load_model

pytestmark = pytest.mark.spec("E4")
CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


def loaded(folder: Path, scales: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """(model, checkpoint) of the tiny model with more tensors beside its weights."""
    write_tiny_model(folder)
    path = folder / "model.safetensors"
    save_file({**load_file(path), **scales}, path, {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    config = ModelConfig.from_hf(checkpoint.hf_config)
    args = LlmArgs(model=folder)
    return load_model(args, config, checkpoint, CPU, torch.float32, select_backend("auto", CPU)), checkpoint


def scales_of(model: Any) -> list[tuple[float, float]]:
    return [(one.spec.key_scale, one.spec.value_scale) for one in model.modules() if isinstance(one, Attention)]


@pytest.mark.parametrize("names", ["self_attn.{}_proj.{}_scale", "self_attn.{1}_scale", "self_attn.attn.{1}_scale"])
def test_scales_are_read_by_any_of_their_names(tmp_path: Path, names: str) -> None:
    prefix = "model.layers.1." + names
    model, checkpoint = loaded(
        tmp_path, {prefix.format("k", "k"): torch.tensor(0.25), prefix.format("v", "v"): torch.tensor([3.0])}
    )
    assert scales_of(model) == [(1.0, 1.0), (1.0, 1.0)]  # of no use to a cache in the model's type
    assert load_cache_scales(model, checkpoint) == 1
    assert scales_of(model) == [(1.0, 1.0), (0.25, 3.0)]


def test_other_scales_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_scale"
    model, checkpoint = loaded(tmp_path / "heads", {name: torch.ones(2)})
    with pytest.raises(UnsupportedFeatureError, match="k_scale' has 2 scales") as caught:
        load_cache_scales(model, checkpoint)
    assert caught.value.field == "dtype"
    model, checkpoint = loaded(tmp_path / "zero", {name: torch.zeros(())})
    with pytest.raises(CheckpointError, match="no scale"):
        load_cache_scales(model, checkpoint)


def test_attention_divides_and_multiplies(tmp_path: Path) -> None:
    """Against plain torch: keys beyond float8's range survive with a scale, and are cut off without one."""
    prefix = "model.layers.0.self_attn."
    model, checkpoint = loaded(tmp_path, {prefix + "k_scale": torch.tensor(4.0), prefix + "v_scale": torch.tensor(0.5)})
    load_cache_scales(model, checkpoint)
    spec = next(one.spec for one in model.modules() if isinstance(one, Attention))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(9, spec.num_heads, spec.head_dim, generator=generator) / 100
    key, value = torch.randn(2, 9, spec.num_kv_heads, spec.head_dim, generator=generator) * 400
    sequences = PagedSequences(
        num_layers=1, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, dtype=torch.float32
    )
    metadata = sequences.step([("a", 9)])
    cache = tuple(part.to(FP8) for part in sequences.caches[0])
    found = ReferenceAttention().forward(spec, query, key, value, cache, metadata)  # type: ignore[arg-type]

    def rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
        return (x / scale).clamp(-448, 448).to(FP8).float() * scale

    group = spec.num_heads // spec.num_kv_heads
    keys, values = (
        rounded(part, scale).repeat_interleave(group, 1).transpose(0, 1) for part, scale in ((key, 4.0), (value, 0.5))
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), keys, values, is_causal=True, scale=spec.scale
    )
    torch.testing.assert_close(found, expected.transpose(0, 1), rtol=1e-5, atol=1e-4)
    assert keys.abs().max() > 448
