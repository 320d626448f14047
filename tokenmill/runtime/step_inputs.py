"""`StepInputs`: what one step reads, computed on the device from slots, for a plan's rows or for a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tokenmill.attention.base import AttentionMetadata
from tokenmill.engine.plan import Row
from tokenmill.ops.upload import upload
from tokenmill.runtime.slot_state import SlotState


@dataclass(frozen=True, slots=True)
class StepInputs:
    """R rows of T tokens in all.

    Args:
        slots: [R] int64, each row's slot.
        next_positions: [R] int64, position of the token that the row would sample.
        last_token_index: [R] int64, index among the T tokens of each row's last one.
        input_ids: [T] int64.
        positions: [T] int64.
        attention: for the attention backend.
    """

    slots: torch.Tensor
    next_positions: torch.Tensor
    last_token_index: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata


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
    return StepInputs(slots, next_positions, ends - 1, state.token_ids[token_slots, positions], positions, attention)


def inputs_of_decode(slots: torch.Tensor, starts: torch.Tensor, state: SlotState, max_kv_len: int) -> StepInputs:
    """Inputs of a step of one token for each row, from device tensors alone: a CUDA graph can be captured of it.

    Args:
        slots: [R] int64; the scratch slot for rows that pad the batch.
        starts: [R] int64, each row's position; -1 for padding.
        state: the slots.
        max_kv_len: no row has more tokens, its new one included.
    """
    block_size, num_rows = state.tokens_per_block, slots.shape[0]
    positions = starts.clamp(min=0)
    index = torch.arange(num_rows + 1, device=slots.device)
    blocks = state.block_tables[slots, positions // block_size].long()  # [R]
    attention = AttentionMetadata(
        query_start=index.int(),
        kv_lens=(starts + 1).int(),  # 0 for padding
        block_tables=state.block_tables[:, : -(-max_kv_len // block_size)][slots],
        slot_mapping=blocks * block_size + positions % block_size,
        num_decode_rows=num_rows,
        query_lens=(1,) * num_rows,
        kv_lens_host=(),
        max_kv_len=max_kv_len,
    )
    return StepInputs(slots, positions + 1, index[:-1], state.token_ids[slots, positions], positions, attention)
