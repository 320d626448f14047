"""Programs run with torch: every architecture against transformers, unfused by hand and as the builder fuses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.test_logits import COMPILED_CASES
from tests.support.paged_cache import PagedSequences
from tests.support.programs import captured, compiled, program_weights
from tests.support.tiny_models import random_tokens, relative_error, tiny_hf_model
from tests.support.tiny_programs import tiny_program
from tokenmill.attention.cpu import CpuAttention
from tokenmill.models.config import ModelConfig
from tokenmill.program.program import OPERATIONS
from tokenmill.runtime.torch_operations import PREPARE, round_to_int8
from tokenmill.runtime.torch_program import TorchProgram

pytestmark = pytest.mark.spec("C1")
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=COMPILED_CASES)
def hf_model(request: pytest.FixtureRequest) -> Any:
    model_type, changes = COMPILED_CASES[request.param]
    return tiny_hf_model(model_type, **changes)


def by_hand(hf_model: Any) -> TorchProgram:
    config = ModelConfig.from_hf(hf_model.config.to_dict())
    return TorchProgram(*tiny_program(config, hf_model.state_dict()), CpuAttention())


def built(hf_model: Any) -> TorchProgram:
    graph = captured(hf_model)
    program = compiled(graph)
    return TorchProgram(program, program_weights(program, graph, hf_model), CpuAttention())


def sequences(hf_model: Any) -> PagedSequences:
    config = ModelConfig.from_hf(hf_model.config.to_dict())
    return PagedSequences(
        num_layers=config.num_layers, num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim
    )


def hf_logits(hf_model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = hf_model(torch.tensor([token_ids])).logits[0]
    return logits


@pytest.mark.parametrize("make", [by_hand, built])
def test_prefill_in_chunks_then_decode_gives_the_logits_of_transformers(hf_model: Any, make: Any) -> None:
    program = make(hf_model)
    first, second = random_tokens(40), random_tokens(23, seed=1)
    cache = sequences(hf_model)
    steps = [[("a", first[:17])], [("b", second[:1]), ("a", first[17:39])], [("a", first[39:40]), ("b", second[1:])]]
    found: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    for rows in steps:
        logits = program.compute_logits(program(cache.batch(rows)))
        for (name, _), part in zip(rows, logits.split([len(tokens) for _, tokens in rows]), strict=True):
            found[name].append(part)
    for name, token_ids in (("a", first), ("b", second)):
        assert relative_error(torch.cat(found[name]), hf_logits(hf_model, token_ids)) < TOLERANCE


def test_every_kind_of_operation_can_be_run() -> None:
    assert PREPARE.keys() == OPERATIONS.keys()


def test_groups_are_rounded_to_255_levels() -> None:
    x = torch.linspace(-3.0, 3.0, 80).reshape(1, 80)
    x[0, 64:] = 0.0
    rounded = round_to_int8(x)
    for first in (0, 32):
        group, values = x[0, first : first + 32], rounded[0, first : first + 32]
        step = group.abs().max() / 127
        assert (values / step - (values / step).round()).abs().max() < 1e-4
        assert (values - group).abs().max() <= step * 0.5001
    assert rounded[0, 64:].tolist() == [0.0] * 16
