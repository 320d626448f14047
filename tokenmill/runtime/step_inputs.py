"""`StepInputs`: what one step reads, computed on the device from slots, for a plan's rows or for a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from tokenmill.attention.base import AttentionMetadata, RowParts
from tokenmill.engine.plan import Row
from tokenmill.ops.decode_inputs import decode_inputs
from tokenmill.ops.upload import upload
from tokenmill.runtime.slot_state import SlotState

DECODE: Final = 0
WITH_HISTORY: Final = 1
WITHOUT_HISTORY: Final = 2
PADDING: Final = 3
"""Kinds of rows of a large step, which stand in this order: one token, several with cached ones before, several."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """R rows of T tokens in all.

    Args:
        slots: [R] int64, each row's slot.
        target_slots: [R] int64, where the row's sampled token goes; the scratch slot's is nobody's.
        next_positions: [R] int64, position of the token that the row would sample.
        last_token_index: [R] int64, index among the T tokens of each row's last one.
        input_ids: [T] int64.
        positions: [T] int64.
        attention: for the attention backend.
    """

    slots: torch.Tensor
    target_slots: torch.Tensor
    next_positions: torch.Tensor
    last_token_index: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata

    def last_of_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of `hidden` [T, ...], those of each row's last token: [R, ...]."""
        if self.attention.num_decode_rows == self.slots.shape[0]:
            return hidden
        return hidden[self.last_token_index]


def inputs_of_rows(rows: Sequence[Row], state: SlotState) -> StepInputs:
    """Inputs of any step, those of one token first."""
    device, block_size = state.device, state.tokens_per_block
    query_lens = tuple(row.num_tokens for row in rows)
    kv_lens_host = tuple(row.start + row.num_tokens for row in rows)
    host = np.array([[row.slot for row in rows], [row.start for row in rows], query_lens], np.int64)
    slots, starts, lens = upload(host, device)  # [R] each
    ends = lens.cumsum(0)  # [R]
    num_tokens, num_rows = sum(query_lens), len(rows)
    if num_tokens == num_rows:
        positions, token_slots = starts, slots
    else:
        row_of_token = torch.repeat_interleave(
            torch.arange(num_rows, device=device), lens, output_size=num_tokens
        )  # [T]
        offset = starts - (ends - lens)  # [R], position minus index
        positions = torch.arange(num_tokens, device=device) + offset[row_of_token]
        token_slots = slots[row_of_token]
    query_start = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
    query_start[1:] = ends
    next_positions = starts + lens
    blocks = state.block_tables[token_slots, positions // block_size].long()  # [T]
    attention = AttentionMetadata(
        query_start=query_start,
        kv_lens=next_positions.int(),
        block_tables=state.block_tables[:, : -(-max(kv_lens_host) // block_size)][slots],
        slot_mapping=blocks * block_size + positions % block_size,
        num_decode_rows=query_lens.count(1),
        query_lens=query_lens,
        kv_lens_host=kv_lens_host,
    )
    token_ids = state.token_ids[token_slots, positions]
    return StepInputs(slots, slots, next_positions, ends - 1, token_ids, positions, attention)


def inputs_of_decode(rows: torch.Tensor, state: SlotState, max_kv_len: int) -> StepInputs:
    """Inputs of a step of one token for each row, from device tensors alone: a CUDA graph can be captured of it.

    Args:
        rows: [2, R] int64: slots, and positions to compute; a row of the scratch slot and position -1 is padding.
        state: the slots.
        max_kv_len: no row has more tokens, its new one included.
    """
    num_blocks = -(-max_kv_len // state.tokens_per_block)
    found = decode_inputs(rows, state.token_ids, state.block_tables, state.tokens_per_block, num_blocks)
    slots, num_rows = rows[0], rows.shape[1]
    attention = AttentionMetadata(
        query_start=found.query_start,
        kv_lens=found.kv_lens,
        block_tables=found.block_tables,
        slot_mapping=found.slot_mapping,
        num_decode_rows=num_rows,
        query_lens=(1,) * num_rows,
        kv_lens_host=(),
        max_kv_len=max_kv_len,
    )
    return StepInputs(slots, slots, found.next_positions, found.row_index, found.input_ids, found.positions, attention)


def inputs_of_prompts(
    rows: torch.Tensor, num_tokens: int, state: SlotState, max_kv_len: int, num_prompts: int = 0
) -> StepInputs:
    """Inputs of a step with prompts, padded to `num_tokens`, from device tensors alone; for CUDA graphs.

    Args:
        rows: [4, R] int64: slots, starts, lengths and target slots; a row of the scratch slot and length 0 is padding.
            [5, R]: with `num_prompts`, the rows' kinds too.
        num_tokens: T, at least the sum of the lengths; the tokens beyond it are computed for nobody.
        state: the slots.
        max_kv_len: no row has more tokens, its new ones included.
        num_prompts: most rows of several tokens with history, and most without; 0: rows are not told apart.
    """
    slots, starts, lens, target_slots = rows[:4]
    ends = lens.cumsum(0)
    index = torch.arange(num_tokens, device=slots.device)
    is_padding = index >= ends[-1]
    row_of_token = torch.searchsorted(ends, index, right=True).clamp(max=slots.shape[0] - 1)  # [T]
    positions = (index + (starts - (ends - lens))[row_of_token]).masked_fill(is_padding, 0)
    token_slots = slots[row_of_token].masked_fill(is_padding, state.scratch_slot)
    query_start = torch.cat((ends.new_zeros(1), ends))
    kv_lens = starts + lens
    block_size, num_rows = state.tokens_per_block, slots.shape[0]
    blocks = state.block_tables[token_slots, positions // block_size].long()  # [T]; the scratch slot's are block 0
    attention = AttentionMetadata(
        query_start=query_start.int(),
        kv_lens=kv_lens.int(),
        block_tables=state.block_tables[:, : -(-max_kv_len // block_size)][slots],
        slot_mapping=blocks * block_size + positions % block_size,
        num_decode_rows=0,
        query_lens=(num_tokens,) * num_rows,
        kv_lens_host=(),
        max_kv_len=max_kv_len,
    )
    if num_prompts:
        attention = replace(attention, parts=_row_parts(attention, rows[4], num_prompts))
    token_ids = state.token_ids[token_slots, positions]
    return StepInputs(slots, target_slots, kv_lens, (ends - 1).clamp(min=0), token_ids, positions, attention)


def _row_parts(step: AttentionMetadata, kinds: torch.Tensor, num_prompts: int) -> RowParts:
    """The rows of a step by their kinds [R], on the device."""
    num_rows, num_tokens = kinds.shape[0], step.slot_mapping.shape[0]
    ends = [(kinds <= kind).sum() for kind in (DECODE, WITH_HISTORY, WITHOUT_HISTORY)]
    offsets = torch.arange(num_prompts + 1, device=kinds.device)

    def of_prompts(first: torch.Tensor, end: torch.Tensor) -> AttentionMetadata:
        rows = torch.minimum(first + offsets, end)  # behind the last one there are rows without tokens
        existing = rows[:-1].clamp(max=num_rows - 1)
        return replace(
            step,
            query_start=step.query_start[rows],
            kv_lens=step.kv_lens[existing],
            block_tables=step.block_tables[existing],
            query_lens=(num_tokens,) * num_prompts,
        )

    num_decode = min(num_rows, num_tokens)
    decode = replace(
        step,
        kv_lens=step.kv_lens.masked_fill(kinds != DECODE, 0)[:num_decode],
        block_tables=step.block_tables[:num_decode],
        slot_mapping=step.slot_mapping[:num_decode],
        num_decode_rows=num_decode,
        query_lens=(1,) * num_decode,
    )
    return RowParts(decode, of_prompts(ends[0], ends[1]), of_prompts(ends[1], ends[2]))
