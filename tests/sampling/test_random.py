"""The generator against its published definition, and the draw against exact probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.sampling.random import draw, stream_key, uniforms

CheckDistribution = Callable[[torch.Tensor, torch.Tensor], None]
ALMOST_ONE = 1 - 2.0**-53
KEYS = st.integers(-(2**63), 2**63 - 1)


def splitmix64(state: int) -> int:
    """Output of SplitMix64 for one state, in Python's integers, as in the paper's reference code."""
    bits = state % 2**64
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return bits ^ (bits >> 31)


def test_uniforms_are_the_published_sequence() -> None:
    # The first outputs of splitmix64.c for the seed 1234567.
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    found = uniforms(torch.full((5,), 1234567), torch.arange(5))
    assert found.tolist() == [(bits >> 11) / 2**53 for bits in published]


@given(st.lists(st.tuples(KEYS, st.integers(0, 2**31 - 1)), min_size=1, max_size=20))
def test_uniforms_match_integer_arithmetic(rows: list[tuple[int, int]]) -> None:
    keys, positions = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    expected = [(splitmix64(key + (position + 1) * 0x9E3779B97F4A7C15) >> 11) / 2**53 for key, position in rows]
    assert uniforms(keys, positions).tolist() == expected
    assert all(0.0 <= value < 1.0 for value in expected)
    assert uniforms(keys, positions.to(torch.int32)).tolist() == expected


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 255))
def test_stream_key_takes_any_64_bit_seed(seed: int, sequence_index: int) -> None:
    key = stream_key(seed, sequence_index)
    assert -(2**63) <= key < 2**63
    assert key == stream_key(seed + 2**64, sequence_index)
    assert key != stream_key(seed + 1, sequence_index)
    assert key != stream_key(seed, sequence_index + 1)


def test_neighbouring_seeds_sequences_and_positions_are_unrelated(assert_distribution: CheckDistribution) -> None:
    flat = torch.full((256,), 1 / 256)
    num = 20_000

    def check_pairs(first: torch.Tensor, second: torch.Tensor) -> None:
        assert_distribution((first * 16).long() * 16 + (second * 16).long(), flat)

    seeds = torch.tensor([stream_key(seed, 0) for seed in range(num + 1)])
    by_seed = uniforms(seeds, torch.zeros(num + 1))
    check_pairs(by_seed[:-1], by_seed[1:])
    by_position = uniforms(torch.full((num + 1,), stream_key(0, 0)), torch.arange(num + 1))
    check_pairs(by_position[:-1], by_position[1:])
    other_sequence = uniforms(torch.full((num + 1,), stream_key(0, 1)), torch.arange(num + 1))
    check_pairs(by_position, other_sequence)
    assert_distribution((by_position * 256).long(), flat)


def test_draw_inverts_the_distribution_function() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 500, generator=generator) * 3
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform.unsqueeze(1), right=True).squeeze(1)
    clear = (cumulative - uniform.unsqueeze(1)).abs().amin(-1) > 1e-6
    assert int(clear.sum()) > 380
    assert torch.equal(draw(logits, uniform)[clear], expected[clear])


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_draw_follows_the_probabilities(scale: float, assert_distribution: CheckDistribution) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * scale
    num = 40_000
    uniform = uniforms(torch.full((num,), stream_key(7, 0)), torch.arange(num))
    tokens = draw(logits.expand(num, 50), uniform)
    assert_distribution(tokens, torch.softmax(logits.double(), -1))


def test_draw_is_exact_over_a_large_vocabulary() -> None:
    """In the middle of a token's share it is that token: a running float32 sum is off by many tokens at the end."""
    vocab_size = 262_144
    logits = torch.zeros(1, vocab_size)
    logits[0, :100] = 8.0  # half of the probability comes first
    tokens = torch.cat([torch.arange(16), torch.linspace(100, vocab_size - 1, 48).long()])
    cumulative = torch.softmax(logits[0].double(), -1).cumsum(-1)
    middle = (cumulative[tokens] + torch.cat([torch.zeros(1), cumulative])[tokens]) / 2
    found = torch.cat([draw(logits.expand(16, -1), part) for part in middle.split(16)])
    assert torch.equal(found, tokens)
    float_sum = torch.softmax(logits[0], -1).cumsum(-1)
    assert not torch.equal(torch.searchsorted(float_sum, middle.float(), right=True), tokens)  # the test can fail


def test_draw_never_takes_a_token_of_probability_zero() -> None:
    infinity = math.inf
    logits = torch.tensor([[-infinity, 1.0, -infinity, 1.0, -infinity], [-infinity, 0.0, -200.0, -infinity, -infinity]])
    assert draw(logits, torch.tensor([0.0, 0.0], dtype=torch.float64)).tolist() == [1, 1]
    assert draw(logits, torch.tensor([ALMOST_ONE, ALMOST_ONE], dtype=torch.float64)).tolist() == [3, 1]
    large = torch.full((1, 100_000), -infinity)
    large[0, 500:60_000] = 0.0
    assert 500 <= int(draw(large, torch.tensor([0.0], dtype=torch.float64))) < 60_000
    assert int(draw(large, torch.tensor([ALMOST_ONE], dtype=torch.float64))) == 59_999


def test_draw_from_nothing_and_from_no_rows() -> None:
    assert draw(torch.full((1, 4), -math.inf), torch.tensor([0.5], dtype=torch.float64)).tolist() == [0]
    assert draw(torch.zeros(0, 4), torch.zeros(0, dtype=torch.float64)).shape == (0,)
