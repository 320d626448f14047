from __future__ import annotations

import pytest
import torch

from tests.support.paged_cache import PagedSequences
from tokenmill.attention.base import AttentionSpec
from tokenmill.attention.cpu import SHORTEST_GROUP, CpuAttention, group_by_length
from tokenmill.attention.reference import ReferenceAttention


def test_short_rows_share_a_group() -> None:
    assert group_by_length([1, SHORTEST_GROUP, 7]) == [[0, 1, 2]]


def test_groups_span_at_most_a_factor_of_two() -> None:
    lengths = [3000, 10, 600, 2049, 1024, 513, SHORTEST_GROUP + 1]
    groups = group_by_length(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        found = [lengths[row] for row in group]
        assert max(found) <= max(SHORTEST_GROUP, 2 * min(found))
        assert group == sorted(group)


@pytest.mark.parametrize("lengths", [[], [5]])
def test_none_or_one(lengths: list[int]) -> None:
    assert group_by_length(lengths) == [[row] for row in range(len(lengths))]


def test_scaled_cache() -> None:
    sequences = PagedSequences(num_layers=2, num_kv_heads=2, head_dim=16, dtype=torch.float16)
    spec = AttentionSpec(4, 2, 16, 0.25, key_scale=0.3, value_scale=0.02)
    generator = torch.Generator().manual_seed(0)
    for rows in ([("a", 7), ("b", 20)], [("c", 1), ("b", 5)], [("a", 1), ("b", 1), ("c", 1)]):
        metadata = sequences.step(rows)
        query, key, value = torch.randn(sum(metadata.query_lens), 8, 16, generator=generator).split([4, 2, 2], 1)
        actual = CpuAttention().forward(spec, query, key, value, sequences.caches[0], metadata)
        expected = ReferenceAttention().forward(spec, query, key, value, sequences.caches[1], metadata)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        for part, reference_part in zip(*sequences.caches, strict=True):
            torch.testing.assert_close(part, reference_part, rtol=0, atol=0, equal_nan=True)
