"""Each step against the logits processors of transformers, and against float64 references that sort."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tokenmill.sampling import steps

INFINITY = math.inf
LOGITS = st.one_of(
    st.floats(-50, 50, width=32),
    st.integers(-3, 3).map(float),
    st.just(-INFINITY),
    st.floats(-(2.0**100), 2.0**100, width=32),
)
ROWS = st.lists(LOGITS, min_size=1, max_size=40).filter(lambda row: max(row) > -INFINITY)


def kept(logits: torch.Tensor) -> list[int]:
    return torch.nonzero(logits > -INFINITY).flatten().tolist()


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 4


# Temperature


@pytest.mark.parametrize("value", [0.01, 0.7, 1.0, 2.5, 100.0])
def test_temperature_matches_transformers(value: float) -> None:
    logits = random_logits(5, 300)
    expected = torch.softmax(TemperatureLogitsWarper(value)(torch.zeros(5, 1), logits.double()), -1)
    found = torch.softmax(steps.temperature(logits, torch.full((5,), value)).double(), -1)
    assert torch.allclose(found, expected, rtol=2e-4, atol=1e-12)


def test_temperature_is_by_row_and_cannot_overflow() -> None:
    logits = torch.tensor([[3e38, -3e38, 1.0], [2.0, 1.0, -INFINITY], [-INFINITY] * 3])
    found = steps.temperature(logits, torch.tensor([1e-30, 0.5, 1.0]))
    assert found.tolist() == [[0.0, -INFINITY, -INFINITY], [0.0, -2.0, -INFINITY], [-INFINITY] * 3]


# Top-k


@pytest.mark.parametrize("k", [1, 2, 50, 256, 257, 999])
def test_top_k_matches_transformers(k: int) -> None:
    logits = random_logits(4, 1000)
    found = steps.top_k(logits, torch.full((4,), k), k)
    assert torch.equal(found, TopKLogitsWarper(k)(torch.zeros(4, 1), logits))


@pytest.mark.spec("E3")
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=4), st.booleans(), st.data())
def test_top_k_keeps_ties_and_is_by_row(ks: list[int], radix: bool, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    rows = [data.draw(st.lists(LOGITS, min_size=size, max_size=size)) for _ in ks]
    logits = torch.tensor(rows, dtype=torch.float32)
    # A large max_k takes the radix selection instead of torch.topk; both must agree with the sort.
    found = steps.top_k(logits, torch.tensor(ks), 5000 if radix else max(1, *ks))
    for row, k, values in zip(found, ks, logits.tolist(), strict=True):
        threshold = sorted(values, reverse=True)[k - 1] if 0 < k < size else -INFINITY
        assert row.tolist() == [value if value >= threshold else -INFINITY for value in values]


# Top-p


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_matches_transformers(p: float) -> None:
    logits = random_logits(6, 2000)
    found = steps.top_p(logits, torch.full((6,), p, dtype=torch.float64))
    expected = TopPLogitsWarper(p)(torch.zeros(6, 1), logits.double())
    assert torch.equal(found.double(), expected)


def check_nucleus(found: torch.Tensor, logits: torch.Tensor, p: float) -> None:
    """What is kept is the smallest set of the most likely tokens, whole ties, that reaches p."""
    probabilities = torch.softmax(logits.double(), -1)
    keep = found > -INFINITY
    assert keep.any()
    assert torch.equal(found[keep], logits[keep])
    last = probabilities[keep].min()
    total = float(probabilities[keep].sum())
    assert total >= p - 1e-6
    assert total - float(probabilities[keep & (probabilities <= last * (1 + 1e-6))].sum()) < p + 1e-6
    if (~keep).any():
        assert probabilities[~keep].max() <= last * (1 + 1e-6)
        assert not (logits[~keep].unsqueeze(1) == logits[keep].unsqueeze(0))[logits[~keep] > -INFINITY].any()


@pytest.mark.spec("E3")
@settings(max_examples=300, deadline=None)
@given(ROWS, st.one_of(st.floats(1e-6, 1, exclude_max=True), st.sampled_from([1e-300, 1e-6, 0.25, 0.5, 1 - 1e-9])))
def test_top_p_keeps_the_smallest_set(row: list[float], p: float) -> None:
    logits = torch.tensor([row])
    check_nucleus(steps.top_p(logits, torch.tensor([p], dtype=torch.float64))[0], logits[0], p)


def test_top_p_is_by_row_keeps_ties_and_passes_rows_that_are_off() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0, -300.0]] * 3 + [[-INFINITY] * 4])
    found = steps.top_p(logits, torch.tensor([0.1, 0.9, 1.0, 0.5], dtype=torch.float64))
    assert [kept(row) for row in found] == [[0, 1], [0, 1, 2], [0, 1, 2, 3], []]


def test_top_p_of_a_flat_vocabulary() -> None:
    """Sums of 262144 equal terms are where float32 would be off by whole tokens."""
    logits = torch.linspace(0, 0.5, 262_144).unsqueeze(0)
    found = steps.top_p(logits, torch.tensor([0.7], dtype=torch.float64))
    cumulative = torch.softmax(logits[0].double(), -1).flip(0).cumsum(0)
    expected = int((cumulative < 0.7).sum()) + 1
    assert abs(len(kept(found[0])) - expected) <= 4  # neighbours tie in float32


# Min-p


@pytest.mark.parametrize("p", [1e-4, 0.05, 0.5, 1.0])
def test_min_p_matches_transformers(p: float) -> None:
    logits = random_logits(6, 2000)
    found = steps.min_p(logits, torch.full((6,), p, dtype=torch.float64))
    assert torch.equal(found.double(), MinPLogitsWarper(p)(torch.zeros(6, 1), logits.double()))


def test_min_p_is_by_row() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]]))
    found = steps.min_p(logits, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert [kept(row) for row in found] == [[0, 1, 2], [0, 1], [0, 1]]


# Penalties


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-2, 11), max_size=9), min_size=1, max_size=4), st.data())
def test_count_tokens(sequences: list[list[int]], data: st.DataObject) -> None:
    first = [data.draw(st.integers(0, len(sequence))) for sequence in sequences]
    tokens = torch.full((len(sequences), 12), 5, dtype=torch.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int32)
    counts = steps.count_tokens(tokens, torch.tensor(first), torch.tensor([len(s) for s in sequences]), 10)
    for row, sequence in enumerate(sequences):
        expected = Counter(token for token in sequence[first[row] :] if 0 <= token < 10)
        assert counts[row].tolist() == [expected[token] for token in range(10)]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty_matches_transformers(penalty: float) -> None:
    logits = random_logits(3, 50)
    logits[0, 3] = 0.0
    logits[1, 4] = -INFINITY
    tokens = torch.randint(0, 50, (3, 30), generator=torch.Generator().manual_seed(1))
    tokens[:, :2] = torch.tensor([3, 4])
    counts = steps.count_tokens(tokens, 0, torch.full((3,), 30), 50)
    found = steps.repetition_penalty(logits, counts, torch.full((3,), penalty))
    assert torch.allclose(found, RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone()), rtol=1e-6)


def test_repetition_penalty_makes_no_infinity() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0, -INFINITY]])
    found = steps.repetition_penalty(logits, torch.ones(1, 4), torch.tensor([1e-30]))
    assert torch.isfinite(found[0, :3]).all()
    assert found[0].argmax() == 0
    assert found[0, 3] == -INFINITY


def test_presence_and_frequency_penalties() -> None:
    logits = random_logits(3, 6)
    counts = torch.tensor([[0.0, 1, 2, 3, 0, 7]] * 3)
    presence, frequency = [0.5, 0.0, -1.5], [0.0, 0.25, 2.0]
    found = steps.count_penalties(logits, counts, torch.tensor(presence), torch.tensor(frequency))
    for row in range(3):
        expected = logits[row].double() - (counts[row] > 0) * presence[row] - counts[row].double() * frequency[row]
        assert torch.allclose(found[row].double(), expected, atol=1e-6)


# Bias and bans


def test_add_bias_matches_transformers() -> None:
    logits = random_logits(1, 20)
    expected = SequenceBiasLogitsProcessor([[[3], 2.5], [[19], 0.125]])(
        torch.zeros(1, 3, dtype=torch.int64), logits.clone()
    )
    expected[0, 0] -= 100.0  # transformers 5.17 refuses token 0; unused entries name it, too
    ids, values = torch.tensor([[3, 0, 19, 0]]), torch.tensor([[2.5, -100.0, 0.125, 0.0]])
    assert torch.allclose(steps.add_bias(logits, ids, values), expected)


def test_ban_is_exact_with_duplicates_and_unused_entries() -> None:
    logits = random_logits(2, 6)
    ids = torch.tensor([[2, 2, 5, 0], [0, 0, 0, 0]])
    banned = torch.tensor([[True, True, True, False], [False] * 4])
    found = steps.ban(logits, ids, banned)
    assert kept(found[0]) == [0, 1, 3, 4]
    assert torch.equal(found[0, [0, 1, 3, 4]], logits[0, [0, 1, 3, 4]])
    assert torch.equal(found[1], logits[1])


WORDS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=6, unique_by=tuple)


@settings(max_examples=200, deadline=None)
@given(WORDS, st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_matching_words_match_transformers(words: list[list[int]], sequence: list[int]) -> None:
    starts = [(i, len(word) - 1 - j, token) for i, word in enumerate(words) for j, token in enumerate(word[:-1])]
    assume(starts)
    word, distance, expected = torch.tensor(starts).T.unsqueeze(1)
    tokens = torch.full((3, 10), 0, dtype=torch.int32)
    tokens[2, : len(sequence)] = torch.tensor(sequence, dtype=torch.int32)
    used = torch.ones(1, len(starts), dtype=torch.bool)
    positions = torch.tensor([len(sequence)])
    matches = steps.matching_words(tokens, torch.tensor([2]), positions, word, distance, expected, used, len(words))
    logits = torch.zeros(1, 5)
    found = steps.ban(logits, torch.tensor([[word[-1] for word in words]]), matches)
    processor = NoBadWordsLogitsProcessor(words, eos_token_id=torch.tensor([99]))
    # transformers looks at a word only when the whole of it fits before the position; ours does at any length.
    padded = torch.tensor([[7] * 5 + sequence])
    assert torch.equal(found, processor(padded, logits.clone()))


def test_steps_leave_their_input_alone() -> None:
    logits = random_logits(2, 30)
    before = logits.clone()
    half, one = torch.full((2,), 0.5, dtype=torch.float64), torch.ones(2, dtype=torch.int64)
    counts = torch.ones(2, 30)
    steps.temperature(logits, torch.full((2,), 0.5))
    steps.top_k(logits, one, 1)
    steps.top_p(logits, half)
    steps.min_p(logits, half)
    steps.repetition_penalty(logits, counts, torch.full((2,), 1.5))
    steps.count_penalties(logits, counts, torch.ones(2), torch.ones(2))
    steps.add_bias(logits, one.unsqueeze(1), torch.ones(2, 1))
    steps.ban(logits, one.unsqueeze(1), torch.ones(2, 1, dtype=torch.bool))
    assert torch.equal(logits, before)


def test_steps_take_no_rows() -> None:
    logits, floats, ids = torch.zeros(0, 7), torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    for found in (
        steps.temperature(logits, floats.float()),
        steps.top_k(logits, ids, 3),
        steps.top_k(logits, ids, 3000),
        steps.top_p(logits, floats),
        steps.min_p(logits, floats),
    ):
        assert found.shape == (0, 7)
    assert np.prod(steps.count_tokens(torch.zeros(0, 4), 0, ids, 7).shape) == 0
