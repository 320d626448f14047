"""Products that are added to the residual stream in passing give what additions in the norms give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models.test_logits import CASES, TOLERANCE
from tests.support.tiny_models import build_model, random_tokens, relative_error, sequences_for, tiny_hf_model
from tokenmill.models.base import CausalLM
from tokenmill.quantization.unquantized import UnquantizedLinear

ROWS = [("a", random_tokens(1)), ("b", random_tokens(17, seed=1)), ("c", random_tokens(9, seed=2))]
WANTED = torch.tensor([26, 0, 17, 3, 3])


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers add several rows in passing, as on a GPU; numbers of rows that were."""
    counts: list[int] = []

    def add_product(method: UnquantizedLinear, total: torch.Tensor, x: torch.Tensor) -> None:
        counts.append(x.shape[0])
        total.add_(method.apply(x, None))

    monkeypatch.setattr(UnquantizedLinear, "adds", lambda method, num_rows, dtype: num_rows > 1)
    monkeypatch.setattr(UnquantizedLinear, "add_product", add_product)
    return counts


def hidden_states(model: CausalLM, rows: list[tuple[str, list[int]]], wanted: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = model(replace(sequences_for(model).batch(rows), wanted=wanted))
    return states


@pytest.mark.spec("E2")
@pytest.mark.parametrize(
    ("case", "products_of_a_layer"),
    [("llama", 2), ("mistral_sliding", 2), ("qwen3", 2), ("qwen3_moe", 1), ("llama_all_biases", 0), ("gemma3", 0)],
)
def test_hidden_states_are_the_same(case: str, products_of_a_layer: int, added: list[int]) -> None:
    model_type, changes = CASES[case]
    hf_model: Any = tiny_hf_model(model_type, **changes)
    model = build_model(hf_model.config.to_dict(), hf_model.state_dict())
    num_products = products_of_a_layer * model.config.num_layers
    actual = hidden_states(model, ROWS, None)
    assert added == [27] * num_products
    some = hidden_states(model, ROWS, WANTED)
    assert added[num_products:] == [27] * (num_products - products_of_a_layer) + [5] * products_of_a_layer
    with pytest.MonkeyPatch.context() as context:
        context.setattr(UnquantizedLinear, "adds", lambda method, num_rows, dtype: False)
        expected = hidden_states(model, ROWS, None)
    assert len(added) == 2 * num_products
    assert relative_error(actual, expected) < TOLERANCE
    assert relative_error(some, expected[WANTED]) < TOLERANCE


def test_single_rows_are_not_added(added: list[int]) -> None:
    hf_model: Any = tiny_hf_model("llama")
    model = build_model(hf_model.config.to_dict(), hf_model.state_dict())
    hidden_states(model, ROWS[:1], None)
    assert not added
