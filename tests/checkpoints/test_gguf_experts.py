"""GGUF files of models with experts: the stacks of experts reach their places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.gguf_files import EXPERTS, EXPERTS_METADATA, tiny_model, write_model
from tests.support.tiny_models import CPU, all_logits, random_tokens, relative_error, sequences_for
from tokenmill.attention.select import select_backend
from tokenmill.checkpoints.base import open_checkpoint
from tokenmill.config import LlmArgs
from tokenmill.errors import CheckpointError
from tokenmill.models.config import ModelConfig
from tokenmill.runtime.model_loader import load_model

MODELS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "qwen3_moe": ({"norm_topk_prob": True, **EXPERTS}, EXPERTS_METADATA),
    "mixtral": (
        {"num_local_experts": 3, "num_experts_per_tok": 2},
        {"add_expert_count": 3, "add_expert_used_count": 2},
    ),
}
"""Changes of the configuration, and what the file says of the experts."""


@pytest.mark.parametrize("model_type", MODELS)
def test_logits_are_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    changes, metadata = MODELS[model_type]
    hf_model = tiny_model(model_type, **changes)
    path = tmp_path / "model.gguf"
    write_model(path, hf_model, **metadata)
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_hf(checkpoint.hf_config)
    args = LlmArgs(model=path)
    model = load_model(args, config, checkpoint, CPU, torch.float32, select_backend("auto", CPU))
    token_ids = random_tokens(30, vocab_size=96)
    actual = all_logits(model, sequences_for(model), [("a", token_ids)])
    with torch.no_grad():
        expected = hf_model(torch.tensor([token_ids])).logits[0]
    assert relative_error(actual, expected) < 1e-4


def test_a_file_that_does_not_say_how_many_experts(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, tiny_model("qwen3_moe", norm_topk_prob=True, **EXPERTS))
    with pytest.raises(CheckpointError, match="expert_count"):
        open_checkpoint(path)
