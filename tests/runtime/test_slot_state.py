"""`SlotState` and `StepInputs` against plain Python: what the device computes from slots is what the rows say."""

from __future__ import annotations

import random

import pytest
import torch

from tokenmill.engine.plan import NewBlocks, NewSlot, Row
from tokenmill.runtime.slot_state import SlotState, StepInputs
from tokenmill.sampling_params import SamplingParams

CPU = torch.device("cpu")
BLOCK = 4


def new_slot(slot: int, tokens: list[int], blocks: list[int]) -> NewSlot:
    return NewSlot(slot, tuple(tokens), len(tokens), tuple(blocks), SamplingParams(), 0, 0, ())


@pytest.mark.spec("C1")
@pytest.mark.parametrize("seed", range(8))
def test_inputs_of_random_steps(seed: int) -> None:
    rng = random.Random(seed)
    state = SlotState(max_slots=6, max_seq_len=64, tokens_per_block=BLOCK, device=CPU)
    tokens = {slot: [rng.randrange(1000) for _ in range(rng.randrange(1, 60))] for slot in rng.sample(range(6), 4)}
    free = rng.sample(range(1, 200), 100)
    tables = {slot: [free.pop() for _ in range(-(-len(ids) // BLOCK))] for slot, ids in tokens.items()}
    split = {slot: rng.randrange(len(table) + 1) for slot, table in tables.items()}
    state.assign([new_slot(slot, tokens[slot], tables[slot][: split[slot]]) for slot in tokens])
    state.append_blocks([NewBlocks(slot, split[slot], tuple(tables[slot][split[slot] :])) for slot in tokens])
    rows = []
    for slot, ids in tokens.items():
        start = rng.randrange(len(ids))
        rows.append(Row(slot, start, rng.choice([1, rng.randrange(1, len(ids) - start + 1)]), sample=True))
    rows.sort(key=lambda row: row.num_tokens > 1)
    inputs = StepInputs(rows, state)

    flat = [(row.slot, position) for row in rows for position in range(row.start, row.start + row.num_tokens)]
    assert inputs.input_ids.tolist() == [tokens[slot][position] for slot, position in flat]
    assert inputs.positions.tolist() == [position for _, position in flat]
    addresses = [tables[slot][position // BLOCK] * BLOCK + position % BLOCK for slot, position in flat]
    assert inputs.attention.slot_mapping.tolist() == addresses
    ends = [row.start + row.num_tokens for row in rows]
    assert inputs.attention.kv_lens.tolist() == list(inputs.attention.kv_lens_host) == ends
    assert inputs.next_positions.tolist() == ends
    assert inputs.attention.num_decode_rows == sum(row.num_tokens == 1 for row in rows)
    counts = [row.num_tokens for row in rows]
    assert inputs.attention.query_start.tolist() == [sum(counts[:index]) for index in range(len(counts) + 1)]
    assert inputs.last_token_index.tolist() == [sum(counts[: index + 1]) - 1 for index in range(len(counts))]
    for row, table in zip(rows, inputs.attention.block_tables.tolist(), strict=True):
        num_blocks = -(-(row.start + row.num_tokens) // BLOCK)
        assert table[:num_blocks] == tables[row.slot][:num_blocks]


def test_a_slot_forgets_what_it_held() -> None:
    state = SlotState(max_slots=1, max_seq_len=16, tokens_per_block=BLOCK, device=CPU)
    state.assign([new_slot(0, [1, 2, 3, 4, 5], [7, 8])])
    state.assign([new_slot(0, [9, 9], [3])])
    inputs = StepInputs([Row(0, 0, 2, sample=True)], state)
    assert inputs.input_ids.tolist() == [9, 9]
    assert inputs.attention.slot_mapping.tolist() == [12, 13]
