from __future__ import annotations

import pytest

from tokenmill.attention.cpu import SHORTEST_GROUP, group_by_length


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
