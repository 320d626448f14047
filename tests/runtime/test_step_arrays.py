"""A step of few rows is written by less code, to the same arrays."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tokenmill.engine.plan import Row
from tokenmill.runtime import step_arrays
from tokenmill.runtime.step_arrays import NUM_END_IDS, StepArrays

SLOTS, LENGTH, BLOCK = 6, 64, 4


def filled(rows: list[Row], max_repeats: int) -> dict[str, object]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1000, (SLOTS, LENGTH + 1))
    tables = rng.integers(0, 90, (SLOTS, LENGTH // BLOCK)).astype(np.int32)
    end_ids = rng.integers(0, 90, (SLOTS, NUM_END_IDS)).astype(np.int32)
    arrays = StepArrays(max_num_tokens=64, max_batch_size=4, max_num_rows=4, max_seq_len=LENGTH, tokens_per_block=BLOCK)
    arrays.fill(rows, tokens, tables, end_ids, max_repeats=max_repeats)
    assert arrays.token_ids[: len(rows)].tolist() == [tokens[row.slot, row.start] for row in rows]
    needed = [-(-(row.start + max_repeats) // BLOCK) for row in rows]  # what stands behind them is nobody's
    for table, num_blocks in zip(arrays.block_tables, needed, strict=False):
        table[num_blocks:] = 0
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(arrays).items()
        if name != "query_start"
    } | {"query_start": arrays.query_start[: len(rows) + 1].tolist()}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_repeats", [1, 5])
def test_few_rows_and_many_are_written_alike(seed: int, max_repeats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    rows = [
        Row(slot, rng.randrange(LENGTH - 5), 1, sample=True) for slot in rng.sample(range(SLOTS), rng.randint(1, 4))
    ]
    found = []
    for few in (0, 4):
        monkeypatch.setattr(step_arrays, "FEW_ROWS", few)
        found.append(filled(rows, max_repeats))
    assert found[0] == found[1]
    assert found[0]["num_rows"] == found[0]["num_decode"] == len(rows)
