"""`SlotLists` against a plain dict of lists."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.sampling.slot_lists import SlotLists

ENTRIES = st.lists(st.tuples(st.integers(-(2**62), 2**62), st.floats(-1e6, 1e6, width=32)), max_size=5)


def columns(entries: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([entry[0] for entry in entries], np.int64), np.array([entry[1] for entry in entries], np.float64)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 4), ENTRIES), max_size=4), max_size=5), st.data())
def test_gather_gives_what_was_set_last(rounds: list[list[tuple[int, list]]], data: st.DataObject) -> None:
    lists = SlotLists(5, (np.int64, np.float32), torch.device("cpu"))
    expected: dict[int, list[tuple[int, float]]] = {slot: [] for slot in range(5)}
    for changes in rounds:
        for slot, entries in changes:
            lists.set(slot, columns(entries))
            expected[slot] = entries
        lists.upload_changes()
        slots = data.draw(st.permutations(range(5)))[: data.draw(st.integers(0, 5))]
        width = max((lists.length(slot) for slot in slots), default=0)
        (ids, values), used = lists.gather(torch.tensor(slots, dtype=torch.int64), width)
        assert ids.shape == values.shape == used.shape == (len(slots), width)
        for row, slot in enumerate(slots):
            num = len(expected[slot])
            assert lists.length(slot) == num
            assert used[row].tolist() == [True] * num + [False] * (width - num)
            assert list(zip(ids[row, :num].tolist(), values[row, :num].tolist(), strict=True)) == expected[slot]
            assert not ids[row, num:].any()
            assert not values[row, num:].any()


def test_one_long_list_takes_no_room_in_other_slots() -> None:
    lists = SlotLists(1000, (np.int64,), torch.device("cpu"))
    lists.set(7, (np.arange(100_000),))
    lists.upload_changes()
    (ids,), used = lists.gather(torch.tensor([6]), 3)
    assert ids.tolist() == [[0, 0, 0]]
    assert not used.any()
    assert sum(pool.numel() for pool in lists._pools) < 100_010
