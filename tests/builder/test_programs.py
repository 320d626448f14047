"""Programs of every architecture against transformers, with all passes, without any, and without each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.programs import ARCHITECTURES, captured, compiled, empty_cache, program_logits, program_weights
from tests.support.programs import tiny_model as make_tiny_model
from tests.support.tiny_models import random_tokens, relative_error
from tokenmill.builder.graph import Graph
from tokenmill.builder.passes import PASSES
from tokenmill.program.program import Program

TOLERANCE = 1e-4
PASS_NAMES = [one.name for one in PASSES]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> tuple[Any, Graph]:
    """(transformers model, its captured graph)."""
    hf_model = make_tiny_model(request.param)
    return hf_model, captured(hf_model)


@torch.no_grad()
def hf_logits(hf_model: Any, token_ids: list[int]) -> torch.Tensor:
    """[T, vocab_size] of one sequence computed in one piece."""
    logits: torch.Tensor = hf_model(torch.tensor([token_ids])).logits[0]
    return logits


def error_of(hf_model: Any, graph: Graph, program: Program) -> float:
    """Relative error of a prefill in two pieces, three decode steps, and a prompt beside them."""
    weights = program_weights(program, graph, hf_model)
    first, second = random_tokens(23, seed=1), random_tokens(9, seed=2)
    sequences = empty_cache(hf_model)
    found = [program_logits(program, weights, sequences, [("a", first[:14])])]
    found += [program_logits(program, weights, sequences, [("a", first[14:20])])]
    mixed = program_logits(program, weights, sequences, [("a", first[20:21]), ("b", second)])
    found += [mixed[:1]]
    found += [program_logits(program, weights, sequences, [("a", [token])]) for token in first[21:]]
    return max(
        relative_error(torch.cat(found), hf_logits(hf_model, first)),
        relative_error(mixed[1:], hf_logits(hf_model, second)),
    )


@pytest.mark.spec("D2")
@pytest.mark.parametrize("disabled", [[], PASS_NAMES], ids=["all_passes", "no_passes"])
def test_logits(model: tuple[Any, Graph], disabled: list[str]) -> None:
    hf_model, graph = model
    assert error_of(hf_model, graph, compiled(graph, disabled)) < TOLERANCE


@pytest.mark.parametrize("name", PASS_NAMES)
def test_logits_without_one_pass(model: tuple[Any, Graph], name: str) -> None:
    hf_model, graph = model
    assert error_of(hf_model, graph, compiled(graph, [name])) < TOLERANCE


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(disabled=st.sets(st.sampled_from(PASS_NAMES)))
def test_logits_without_any_set_of_passes(model: tuple[Any, Graph], disabled: set[str]) -> None:
    hf_model, graph = model
    assert error_of(hf_model, graph, compiled(graph, disabled)) < TOLERANCE


def test_only_the_wanted_rows_are_computed(model: tuple[Any, Graph]) -> None:
    hf_model, graph = model
    program = compiled(graph)
    weights = program_weights(program, graph, hf_model)
    token_ids = random_tokens(17)
    logits = program_logits(program, weights, empty_cache(hf_model), [("a", token_ids)], row_index=[16, 3])
    assert relative_error(logits, hf_logits(hf_model, token_ids)[[16, 3]]) < TOLERANCE
    rows = {buffer.name: buffer.rows for buffer in (*program.buffers, program.output)}
    kinds = [operation.kind for operation in program.operations]
    last_attention = len(kinds) - 1 - kinds[::-1].index("attention")
    after = program.operations[last_attention + 1 :]
    assert len(after) > 5
    assert {rows[operation.outputs["y"].buffer] for operation in after} == {"rows"}
