"""Integer weights and the radix selection against sorted references."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.sampling.exact import (
    float_from_ordered_bits,
    integer_weights,
    largest_threshold,
    ordered_bits,
    rows_per_slice,
    rows_where,
)

INT32 = st.integers(-(2**31), 2**31 - 1)
# Keys that differ in the last bits, in the middle, or in the sign: each digit of the selection must matter.
KEYS = st.one_of(INT32, st.integers(-3, 3), st.integers(0, 5).map(lambda value: value << 10), st.just(-(2**31)))


def reference_threshold(keys: list[int], measure: list[int], target: int) -> int:
    total = 0
    for key, amount in sorted(zip(keys, measure, strict=True), reverse=True):
        total += amount
        if total >= target:
            return key
    raise AssertionError("target beyond the total")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_largest_threshold_matches_a_sort(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    rows = []
    for _ in range(data.draw(st.integers(1, 4))):
        keys = data.draw(st.lists(KEYS, min_size=size, max_size=size))
        measure = data.draw(st.lists(st.integers(0, 2**58), min_size=size, max_size=size).filter(any))
        rows.append((keys, measure, data.draw(st.integers(1, sum(measure)))))
    found = largest_threshold(
        torch.tensor([row[0] for row in rows], dtype=torch.int32),
        torch.tensor([row[1] for row in rows]),
        torch.tensor([row[2] for row in rows]),
    )
    assert found.dtype == torch.int32
    assert found.tolist() == [reference_threshold(*row) for row in rows]


def test_largest_threshold_counts_ties_of_a_large_row() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-500, 500, (3, 20_000), generator=generator, dtype=torch.int32)
    target = torch.tensor([1, 777, 20_000])
    found = largest_threshold(keys, torch.ones(1, 1, dtype=torch.int64).expand(3, 20_000), target)
    ordered = keys.sort(dim=-1, descending=True).values
    assert found.tolist() == ordered.gather(1, target.unsqueeze(1) - 1).squeeze(1).tolist()


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
def test_ordered_bits_keep_the_order_and_turn_back(values: list[float]) -> None:
    floats = torch.tensor(values)
    keys = ordered_bits(floats)
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if a < b:
                assert keys[i] < keys[j]
    restored = float_from_ordered_bits(keys)
    assert torch.equal(restored.view(torch.int32), floats.view(torch.int32))


def test_integer_weights_are_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(1)
    for vocab_size in (1, 2, 300, 262_144):
        logits = torch.randn(2, vocab_size, generator=generator) * 5 + 100
        weights, integers = integer_weights(logits)
        exact = torch.exp(logits.double() - logits.double().amax(-1, keepdim=True))
        unit = 2.0 ** (62 - vocab_size.bit_length())
        assert torch.allclose(weights.double(), exact, rtol=1e-6, atol=1e-25)
        assert ((integers / unit - exact).abs() <= 1e-6 * exact + 1 / unit).all()
        assert integers.max() == unit
        share = integers / integers.sum(-1, keepdim=True)
        assert float((share - exact / exact.sum(-1, keepdim=True)).abs().sum(-1).max()) < 1e-6


def test_integer_weights_cannot_overflow() -> None:
    for vocab_size in (1, 1023, 1024, 49_152, 262_144):
        total = integer_weights(torch.zeros(1, vocab_size))[1].sum(dtype=torch.int64)
        assert 0 < int(total) < 2**62


def test_integer_weights_of_impossible_tokens_are_zero() -> None:
    infinity = math.inf
    _, integers = integer_weights(torch.tensor([[-infinity, 0.0, -1e38, 3.0], [-infinity] * 4]))
    assert integers[0].tolist()[::2] == [0, 0]
    assert (integers[0, 1::2] > 0).all()
    assert integers[1].tolist() == [0, 0, 0, 0]


def test_integer_weights_do_not_depend_on_the_batch() -> None:
    logits = torch.randn(9, 5_001, generator=torch.Generator().manual_seed(2)) * 4
    together = integer_weights(logits)[1]
    for row in range(9):
        assert torch.equal(integer_weights(logits[row : row + 1].clone())[1][0], together[row])


@given(st.lists(st.booleans(), max_size=40))
def test_rows_where(mask: list[bool]) -> None:
    found = rows_where(torch.tensor(mask, dtype=torch.bool), sum(mask))
    assert found.tolist() == np.flatnonzero(np.array(mask, dtype=bool)).tolist()


def test_rows_per_slice_is_at_least_one() -> None:
    assert rows_per_slice(torch.empty(4, 10_000_000, device="meta")) == 1
    assert rows_per_slice(torch.empty(4, 16, device="meta")) > 100
