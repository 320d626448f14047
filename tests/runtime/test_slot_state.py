"""`SlotState` and what steps read from it, against plain Python: the device computes what the rows say."""

from __future__ import annotations

import random

import pytest
import torch

from tokenmill.engine.plan import NewBlocks, NewSlot, Row
from tokenmill.runtime import slot_state
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_inputs import inputs_of_decode, inputs_of_prompts, inputs_of_rows
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
    inputs = inputs_of_rows(rows, state)

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


def test_pieces_are_written_alike_on_host_and_device() -> None:
    pieces = [(2, 1, (5, 6, 7)), (0, 0, ()), (1, 3, (8,)), (0, 2, (9, 4))]
    tables = torch.zeros(2, 3, 4, dtype=torch.int32)
    slot_state._scatter_on_host(tables[0], pieces)
    slot_state._scatter_on_device(tables[1], pieces)
    assert tables[0].tolist() == tables[1].tolist() == [[0, 0, 9, 4], [0, 0, 0, 8], [0, 5, 6, 7]]


def test_a_slot_forgets_what_it_held() -> None:
    state = SlotState(max_slots=1, max_seq_len=16, tokens_per_block=BLOCK, device=CPU)
    state.assign([new_slot(0, [1, 2, 3, 4, 5], [7, 8])])
    state.assign([new_slot(0, [9, 9], [3])])
    inputs = inputs_of_rows([Row(0, 0, 2, sample=True)], state)
    assert inputs.input_ids.tolist() == [9, 9]
    assert inputs.attention.slot_mapping.tolist() == [12, 13]


def test_decode_inputs_from_device_tensors_are_those_of_rows_with_padding_beside_them() -> None:
    state = SlotState(max_slots=3, max_seq_len=32, tokens_per_block=BLOCK, device=CPU)
    state.assign([new_slot(0, [1, 2, 3, 4, 5], [7, 8]), new_slot(2, [6] * 9, [3, 4, 5])])
    rows = [Row(2, 8, 1, sample=True), Row(0, 4, 1, sample=True)]
    expected = inputs_of_rows(rows, state)
    inputs = inputs_of_decode(torch.tensor([[2, 0, state.scratch_slot], [8, 4, -1]]), state, max_kv_len=16)
    for name in ("slots", "next_positions", "last_token_index", "input_ids", "positions"):
        assert getattr(inputs, name)[:2].tolist() == getattr(expected, name).tolist(), name
    assert inputs.attention.kv_lens.tolist() == [9, 5, 0]
    assert inputs.attention.slot_mapping.tolist() == [*expected.attention.slot_mapping.tolist(), 0]
    assert inputs.attention.block_tables[:2, :3].tolist() == expected.attention.block_tables.tolist()
    assert inputs.attention.kv_len_bound == 16


def test_rows_of_a_large_step_are_told_apart_on_the_device() -> None:
    """One row of one token, one that goes on, two that begin; padding rows have no tokens."""
    state = SlotState(max_slots=4, max_seq_len=32, tokens_per_block=BLOCK, device=CPU)
    lens, starts, blocks = [1, 4, 5, 2], [6, 3, 0, 0], [[3, 4], [5, 6], [7, 8], [9]]
    state.assign([new_slot(slot, list(range(10)), table) for slot, table in enumerate(blocks)])
    rows = torch.tensor([[0, 1, 2, 3, 4, 4], [*starts, 0, 0], [*lens, 0, 0], [4] * 6, [0, 1, 2, 2, 3, 3]])
    inputs = inputs_of_prompts(rows, 16, state, max_kv_len=32, num_prompts=3)
    parts = inputs.attention.parts
    assert parts is not None
    assert parts.decode.num_decode_rows == 6
    assert parts.decode.kv_lens.tolist() == [7, 0, 0, 0, 0, 0]
    assert parts.decode.slot_mapping.tolist() == inputs.attention.slot_mapping[:6].tolist()
    assert parts.decode.block_tables[0, :2].tolist() == blocks[0]
    history, new = parts.with_history, parts.without_history
    assert history.query_start.tolist() == [1, 5, 5, 5]
    assert history.kv_lens[:1].tolist() == [7] and history.block_tables[0, :2].tolist() == blocks[1]
    assert new.query_start.tolist() == [5, 10, 12, 12]
    assert new.kv_lens[:2].tolist() == [5, 2] and new.block_tables[:2, 0].tolist() == [7, 9]
    assert history.query_lens == new.query_lens == (16, 16, 16)


def test_a_large_step_may_have_one_kind_of_rows_and_no_padding() -> None:
    state = SlotState(max_slots=2, max_seq_len=32, tokens_per_block=BLOCK, device=CPU)
    state.assign([new_slot(0, list(range(8)), [3, 4]), new_slot(1, list(range(8)), [5, 6])])
    for kind in (1, 2):
        rows = torch.tensor([[0, 1], [0, 0], [8, 8], [0, 1], [kind, kind]])
        parts = inputs_of_prompts(rows, 16, state, max_kv_len=32, num_prompts=2).attention.parts
        assert parts is not None and parts.decode.kv_lens.tolist() == [0, 0]
        used, unused = parts.with_history, parts.without_history
        if kind == 2:
            used, unused = unused, used
        assert used.query_start.tolist() == [0, 8, 16]
        assert unused.query_start.diff().tolist() == [0, 0]


def test_prompt_inputs_from_device_tensors_are_those_of_rows_with_padding_behind_them() -> None:
    state = SlotState(max_slots=3, max_seq_len=32, tokens_per_block=BLOCK, device=CPU)
    state.assign([new_slot(0, [1, 2, 3, 4, 5], [7, 8]), new_slot(2, [6] * 9, [3, 4, 5])])
    rows = [Row(2, 3, 4, sample=False), Row(0, 0, 5, sample=True)]
    expected = inputs_of_rows(rows, state)
    scratch = state.scratch_slot
    device_rows = torch.tensor([[2, 0, scratch, scratch], [3, 0, 0, 0], [4, 5, 0, 0], [scratch, 0, scratch, scratch]])
    inputs = inputs_of_prompts(device_rows, 16, state, max_kv_len=16)
    for name in ("input_ids", "positions"):
        assert getattr(inputs, name)[:9].tolist() == getattr(expected, name).tolist(), name
    for name in ("slots", "next_positions", "last_token_index"):
        assert getattr(inputs, name)[:2].tolist() == getattr(expected, name).tolist(), name
    assert inputs.target_slots.tolist() == [scratch, 0, scratch, scratch]
    assert inputs.attention.slot_mapping.tolist() == [*expected.attention.slot_mapping.tolist(), *[0] * 7]
    assert inputs.attention.query_start.tolist() == [0, 4, 9, 9, 9]
    assert inputs.attention.kv_lens.tolist() == [7, 5, 0, 0]
    assert inputs.positions[9:].tolist() == [0] * 7
