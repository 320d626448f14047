"""Tokens on their way to the host."""

from __future__ import annotations

import torch

from tokenmill.outputs import Logprob
from tokenmill.sampling.logprobs import token_logprobs
from tokenmill.sampling.sampled_tokens import SampledRow, SampledTokens, TokenReadback, collect


def test_collect_without_logprobs() -> None:
    sampled = SampledTokens(torch.tensor([5, 0, 7]), torch.tensor([False, True, False]))
    assert collect(sampled) == [SampledRow(5, None), SampledRow(None, None), SampledRow(7, None)]


def test_collect_gives_logprobs_to_the_rows_that_want_them() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]))
    sampled = SampledTokens(
        token_ids=torch.tensor([2, 1, 0, 0]),
        invalid=torch.tensor([False, False, False, True]),
        logprobs=token_logprobs(logits, torch.tensor([1, 0]), 2),
        logprob_rows=(1, 2),
        num_logprobs=(0, 2),
    )
    rows = collect(sampled)
    assert [row.token_id for row in rows] == [2, 1, 0, None]
    assert [row.logprobs is None for row in rows] == [True, False, False, True]
    assert rows[1].logprobs is not None
    assert rows[2].logprobs is not None
    assert list(rows[1].logprobs) == [1]
    assert list(rows[2].logprobs) == [0, 2, 1]
    assert rows[2].logprobs[0] == Logprob(logits[1, 0].item(), 3)


def test_no_rows() -> None:
    empty = SampledTokens(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    assert collect(empty) == []


def test_a_readback_is_of_the_moment_it_was_made() -> None:
    """The next step may reuse the tensors while the host has not read this one."""
    token_ids = torch.tensor([5, 6])
    readback = TokenReadback(SampledTokens(token_ids, torch.zeros(2, dtype=torch.bool)))
    token_ids.fill_(0)
    assert [row.token_id for row in readback.wait()] == [5, 6]
