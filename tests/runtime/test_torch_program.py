"""Programs run with torch: every architecture against transformers, and each operation against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.test_logits import CASES
from tests.support.paged_cache import PagedSequences
from tests.support.single_thread import single_thread
from tests.support.tiny_models import random_tokens, relative_error, tiny_hf_model
from tests.support.tiny_programs import tiny_program
from tokenmill.attention.cpu import CpuAttention
from tokenmill.models.config import ModelConfig
from tokenmill.runtime.torch_program import TorchProgram

pytestmark = pytest.mark.spec("D5")
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CASES)
def models(request: pytest.FixtureRequest) -> Any:
    with single_thread():
        model_type, changes = CASES[request.param]
        hf_model = tiny_hf_model(model_type, **changes)
        config = ModelConfig.from_hf(hf_model.config.to_dict())
        program, weights = tiny_program(config, hf_model.state_dict())
        yield hf_model, config, TorchProgram(program, weights, CpuAttention())


def sequences(config: ModelConfig) -> PagedSequences:
    return PagedSequences(
        num_layers=config.num_layers, num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim
    )


def hf_logits(hf_model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = hf_model(torch.tensor([token_ids])).logits[0]
    return logits


def test_prefill_in_chunks_then_decode_gives_the_logits_of_transformers(models: Any) -> None:
    hf_model, config, program = models
    first, second = random_tokens(40), random_tokens(23, seed=1)
    cache = sequences(config)
    steps = [[("a", first[:17])], [("b", second[:1]), ("a", first[17:39])], [("a", first[39:40]), ("b", second[1:])]]
    found: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    for rows in steps:
        logits = program.compute_logits(program(cache.batch(rows)))
        for (name, _), part in zip(rows, logits.split([len(tokens) for _, tokens in rows]), strict=True):
            found[name].append(part)
    for name, token_ids in (("a", first), ("b", second)):
        assert relative_error(torch.cat(found[name]), hf_logits(hf_model, token_ids)) < TOLERANCE
