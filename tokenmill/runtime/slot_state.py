"""`SlotState`: tokens and block tables of running sequences, on the device, by slot.

A plan's `new_slots` and `new_blocks` are written here; everything else that a step needs (input ids, positions, cache
addresses) is computed on the device from it, so a step uploads only what changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenmill.attention.base import AttentionMetadata
from tokenmill.engine.plan import NewBlocks, NewSlot, Row


class SlotState:
    """State of `max_slots` sequences.

    Args:
        max_slots: S.
        max_seq_len: longest sequence in tokens.
        tokens_per_block: tokens in one cache block.
        device: where it lives.
    """

    def __init__(self, max_slots: int, max_seq_len: int, tokens_per_block: int, device: torch.device) -> None:
        max_blocks = -(-max_seq_len // tokens_per_block)
        self.tokens_per_block = tokens_per_block
        self.device = device
        # One more column than a sequence can hold: a token sampled at the very end has a place to go.
        self.token_ids = torch.zeros(max_slots, max_seq_len + 1, dtype=torch.int64, device=device)  # [S, L + 1]
        self.block_tables = torch.zeros(max_slots, max_blocks, dtype=torch.int32, device=device)  # [S, max_blocks]

    def assign(self, new_slots: Sequence[NewSlot]) -> None:
        """Sequences take slots."""
        for new in new_slots:
            tokens = torch.tensor(new.token_ids, dtype=torch.int64)
            self.token_ids[new.slot, : len(tokens)] = tokens.to(self.device, non_blocking=True)
            self.append_blocks((NewBlocks(new.slot, 0, new.block_ids),))

    def append_blocks(self, new_blocks: Sequence[NewBlocks]) -> None:
        """Block tables grow."""
        for new in new_blocks:
            if not new.block_ids:
                continue
            blocks = torch.tensor(new.block_ids, dtype=torch.int32).to(self.device, non_blocking=True)
            self.block_tables[new.slot, new.start : new.start + len(new.block_ids)] = blocks


class StepInputs:
    """What one step reads, computed on the device from the plan's rows.

    Attributes:
        slots: [R] int64, each row's slot.
        next_positions: [R] int64, position of the token that the row would sample.
        last_token_index: [R] int64, index among the T tokens of each row's last one.
        input_ids: [T] int64.
        positions: [T] int64.
        attention: for the attention backend.
    """

    def __init__(self, rows: Sequence[Row], state: SlotState) -> None:
        device = state.device
        query_lens = tuple(row.num_tokens for row in rows)
        kv_lens_host = tuple(row.start + row.num_tokens for row in rows)
        host = torch.tensor([[row.slot for row in rows], [row.start for row in rows], query_lens], dtype=torch.int64)
        slots, starts, lens = host.to(device, non_blocking=True).unbind(0)  # [R] each
        ends = lens.cumsum(0)  # [R]
        num_tokens, num_rows = sum(query_lens), len(rows)
        if num_tokens == num_rows:
            self.positions, token_slots = starts, slots
        else:
            row_of_token = torch.repeat_interleave(
                torch.arange(num_rows, device=device), lens, output_size=num_tokens
            )  # [T]
            offset = starts - (ends - lens)  # [R], position minus index
            self.positions = torch.arange(num_tokens, device=device) + offset[row_of_token]
            token_slots = slots[row_of_token]
        self.slots = slots
        self.next_positions = starts + lens
        self.last_token_index = ends - 1
        self.input_ids = state.token_ids[token_slots, self.positions]
        block_size = state.tokens_per_block
        blocks = state.block_tables[token_slots, self.positions // block_size].long()  # [T]
        query_start = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        query_start[1:] = ends
        max_blocks = -(-max(kv_lens_host) // block_size)
        self.attention = AttentionMetadata(
            query_start=query_start,
            kv_lens=self.next_positions.int(),
            block_tables=state.block_tables[slots, :max_blocks],
            slot_mapping=blocks * block_size + self.positions % block_size,
            num_decode_rows=sum(1 for length in query_lens if length == 1),
            query_lens=query_lens,
            kv_lens_host=kv_lens_host,
        )
