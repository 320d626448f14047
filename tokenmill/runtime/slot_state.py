"""`SlotState`: tokens and block tables of running sequences, on the device, by slot.

A plan's `new_slots` and `new_blocks` are written here; everything else that a step needs (input ids, positions, cache
addresses) is computed on the device from it, so a step uploads only what changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from tokenmill.engine.plan import NewBlocks, NewSlot
from tokenmill.ops.upload import upload


class SlotState:
    """State of `max_slots` sequences, and of one scratch slot that pads batches.

    Args:
        max_slots: S.
        max_seq_len: longest sequence in tokens, L.
        tokens_per_block: tokens in one cache block.
        device: where it lives.
    """

    def __init__(self, max_slots: int, max_seq_len: int, tokens_per_block: int, device: torch.device) -> None:
        max_blocks = -(-max_seq_len // tokens_per_block)
        self.scratch_slot = max_slots
        self.max_seq_len = max_seq_len
        self.tokens_per_block = tokens_per_block
        self.device = device
        # One more column than a sequence can hold: a token sampled at the very end has a place to go.
        self.token_ids = torch.zeros(max_slots + 1, max_seq_len + 1, dtype=torch.int64, device=device)  # [S + 1, L + 1]
        self.block_tables = torch.zeros(max_slots + 1, max_blocks, dtype=torch.int32, device=device)  # [S + 1, blocks]

    def assign(self, new_slots: Sequence[NewSlot]) -> None:
        """Sequences take slots."""
        if not new_slots:
            return
        _scatter(self.token_ids, [(new.slot, 0, new.token_ids) for new in new_slots])
        _scatter(self.block_tables, [(new.slot, 0, new.block_ids) for new in new_slots])

    def append_blocks(self, new_blocks: Sequence[NewBlocks]) -> None:
        """Block tables grow."""
        if new_blocks:
            _scatter(self.block_tables, [(new.slot, new.start, new.block_ids) for new in new_blocks])


_Pieces: TypeAlias = Sequence[tuple[int, int, Sequence[int]]]
"""Row, first column, values."""


def _scatter(table: torch.Tensor, pieces: _Pieces) -> None:
    """Write `pieces` into `table`."""
    if table.device.type == "cpu":
        _scatter_on_host(table, pieces)
    else:
        _scatter_on_device(table, pieces)


def _scatter_on_host(table: torch.Tensor, pieces: _Pieces) -> None:
    """Without torch, whose code is in no cache between two steps of a CPU: 10 us instead of 250."""
    array = table.numpy()  # the same memory
    for row, first, values in pieces:
        array[row, first : first + len(values)] = values


def _scatter_on_device(table: torch.Tensor, pieces: _Pieces) -> None:
    """With one upload and one launch."""
    lens = np.fromiter((len(values) for _, _, values in pieces), np.int64, len(pieces))
    total = int(lens.sum())
    if total == 0:
        return
    packed = np.empty((2, total), np.int64)  # flat index, value
    starts = np.fromiter((row * table.shape[1] + column for row, column, _ in pieces), np.int64, len(pieces))
    ends = lens.cumsum()
    packed[0] = np.arange(total) + np.repeat(starts - (ends - lens), lens)
    packed[1] = np.concatenate([np.asarray(values, np.int64) for _, _, values in pieces if len(values)])
    index, values = upload(packed, table.device)
    table.view(-1).index_copy_(0, index, values.to(table.dtype))
