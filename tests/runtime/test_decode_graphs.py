"""Sizes of decode graphs. What they compute is tested on a GPU (tests/gpu)."""

from __future__ import annotations

from tokenmill.runtime.decode_graphs import batch_bucket, kv_bucket


def test_batches_are_padded_by_little_and_there_are_few_sizes() -> None:
    buckets = [batch_bucket(rows, 2048) for rows in range(1, 2049)]
    assert all(rows <= bucket <= max(rows + 3, rows * 1.25) for rows, bucket in enumerate(buckets, start=1))
    assert len(set(buckets)) <= 64
    assert buckets == sorted(buckets)
    assert batch_bucket(61, 61) == 61


def test_context_bounds_are_powers_of_two_within_the_longest_sequence() -> None:
    assert [kv_bucket(length, 5000) for length in (1, 1024, 1025, 2048, 4097, 5000)] == [
        1024,
        1024,
        2048,
        2048,
        5000,
        5000,
    ]
    assert kv_bucket(3, 256) == 256
