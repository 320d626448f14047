"""Copies of the tiny model with something wrong or different, and the build options that its tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

ROWS: Final[dict[str, Any]] = {"device": "cuda", "capture": "dispatch", "kv_cache_dtype": "float32"}
"""Engines whose weights are plain rows, which torch computes with anywhere."""

EXPECTED: Final = {
    "missing": r"1 tensor missing: model.layers.0.self_attn.k_proj.weight \[16, 32\]",
    "unexpected": r"1 tensor unexpected: model.layers.0.surprise.weight \[3\]",
    "shape": r"model.layers.0.self_attn.k_proj.weight is \[15, 32\], expected \[16, 32\]",
}


def changed_checkpoint(model_dir: Path, folder: Path, damage: str) -> Path:
    """A copy of the tiny model with one tensor missing, too many or of another shape."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model_dir / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        tensors["model.layers.0.surprise.weight"] = torch.zeros(3)
    elif damage == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        generator = torch.Generator().manual_seed(7)
        tensors = {key: value + torch.randn(value.shape, generator=generator) * 0.1 for key, value in tensors.items()}
    for file in model_dir.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors")
    return folder
