"""Log-probabilities against float64 log-softmax, in slices, and as dicts on the host."""

from __future__ import annotations

import pytest
import torch

from tokenmill.outputs import Logprob
from tokenmill.sampling import exact, logprobs
from tokenmill.sampling.logprobs import (
    LogprobTensors,
    pack,
    prompt_logprobs,
    to_token_logprobs,
    token_logprobs,
    unpack,
)

FIELDS = ("token_ids", "logprobs", "ranks", "top_token_ids", "top_logprobs")


def check(found: LogprobTensors, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> None:
    expected = torch.log_softmax(logits.double(), -1)
    ordered = expected.sort(dim=-1, descending=True)
    chosen = expected.gather(1, token_ids.unsqueeze(1))
    assert torch.equal(found.token_ids, token_ids)
    assert torch.allclose(found.logprobs.double(), chosen.squeeze(1), atol=1e-6, rtol=1e-6)
    assert torch.equal(found.ranks, (expected > chosen).sum(-1) + 1)
    assert torch.equal(found.top_token_ids, ordered.indices[:, :num_top])
    assert torch.allclose(found.top_logprobs.double(), ordered.values[:, :num_top], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("num_top", [0, 1, 5])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_token_logprobs(num_rows: int, num_top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, 300, generator=generator) * 6 + 40
    token_ids = torch.randint(0, 300, (num_rows,), generator=generator)
    whole = token_logprobs(logits, token_ids, num_top)
    check(whole, logits, token_ids, num_top)
    monkeypatch.setattr(exact, "_MAX_ELEMENTS_PER_THREAD", 1)
    monkeypatch.setattr(logprobs, "MAX_ELEMENTS", 600)
    sliced = token_logprobs(logits, token_ids, num_top)
    by_prompt = prompt_logprobs(logits / 2, lambda half: half * 2, token_ids, num_top, vocab_size=300)
    for field in FIELDS:
        assert torch.equal(getattr(sliced, field), getattr(whole, field))
        assert torch.equal(getattr(by_prompt, field), getattr(whole, field))


def test_prompt_logprobs_never_hold_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "MAX_ELEMENTS", 100)
    output_layer = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(10, 4, generator=torch.Generator().manual_seed(2))
    token_ids = torch.arange(10)
    seen: list[int] = []

    def compute_logits(states: torch.Tensor) -> torch.Tensor:
        seen.append(len(states))
        return states @ output_layer

    found = prompt_logprobs(hidden, compute_logits, token_ids, 3, vocab_size=30)
    assert seen == [3, 3, 3, 1]
    check(found, hidden @ output_layer, token_ids, 3)


def test_more_alternatives_than_tokens() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    found = token_logprobs(logits, torch.tensor([0]), 1024)
    assert found.top_token_ids.tolist() == [[1, 2, 0]]
    (entry,) = to_token_logprobs(found, [1024])
    assert list(entry) == [0, 1, 2]


def test_the_batch_does_not_change_a_logprob() -> None:
    logits = torch.randn(16, 50_000, generator=torch.Generator().manual_seed(3)) * 3
    token_ids = torch.arange(16)
    together = token_logprobs(logits, token_ids, 2)
    for row in range(16):
        alone = token_logprobs(logits[row : row + 1].clone(), token_ids[row : row + 1], 2)
        assert torch.equal(alone.logprobs[0], together.logprobs[row])
        assert torch.equal(alone.top_logprobs[0], together.top_logprobs[row])


@pytest.mark.parametrize("num_top", [0, 4])
def test_pack_and_unpack(num_top: int) -> None:
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(4))
    logits[1, 3] = float("-inf")
    tensors = token_logprobs(logits, torch.tensor([0, 3, 2, 19, 4]), num_top)
    for restored in (unpack(pack(tensors), num_top), tensors.cpu()):
        for field in FIELDS:
            assert torch.equal(getattr(restored, field), getattr(tensors, field))
            assert getattr(restored, field).dtype == getattr(tensors, field).dtype


def test_dicts_on_the_host() -> None:
    tensors = LogprobTensors(
        token_ids=torch.tensor([7, 3, 1]),
        logprobs=torch.tensor([-5.0, -0.5, -1.0]),
        ranks=torch.tensor([9, 1, 2]),
        top_token_ids=torch.tensor([[3, 4, 5], [3, 4, 5], [3, 1, 5]]),
        top_logprobs=torch.tensor([[-0.5, -1.0, -2.0], [-0.5, -1.0, -2.0], [-0.5, -1.0, -1.0]]),
    )
    found = to_token_logprobs(tensors, [2, 3, 3])
    assert [list(entry.items()) for entry in found] == [
        [(7, Logprob(-5.0, 9)), (3, Logprob(-0.5, 1)), (4, Logprob(-1.0, 2))],
        [(3, Logprob(-0.5, 1)), (4, Logprob(-1.0, 2)), (5, Logprob(-2.0, 3))],
        [(1, Logprob(-1.0, 2)), (3, Logprob(-0.5, 1)), (5, Logprob(-1.0, 2))],  # equals have one rank
    ]
    assert to_token_logprobs(tensors, [0, 0, 0]) == [
        {7: Logprob(-5.0, 9)}, {3: Logprob(-0.5, 1)}, {1: Logprob(-1.0, 2)},
    ]  # fmt: skip
