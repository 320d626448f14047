"""What a step of one token for each row reads, found from its rows' slots: called once a step by `runtime.step_inputs`.

Shapes: R rows, S slots, L tokens of the longest sequence, B tokens per block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import torch


class DecodeInputs(NamedTuple):
    """Of R rows of one token.

    Args:
        input_ids, positions, next_positions: [R] int64.
        slot_mapping: [R] int64, where each row's key and value go: block * B + offset.
        row_index: [R] int64, 0 to R - 1.
        kv_lens: [R] int32, cached tokens with the new one; 0 for padding.
        query_start: [R + 1] int32, 0 to R.
        block_tables: [R, blocks] int32.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    next_positions: torch.Tensor
    slot_mapping: torch.Tensor
    row_index: torch.Tensor
    kv_lens: torch.Tensor
    query_start: torch.Tensor
    block_tables: torch.Tensor


FindInputs: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int], DecodeInputs]


def decode_inputs(
    rows: torch.Tensor, token_ids: torch.Tensor, block_tables: torch.Tensor, tokens_per_block: int, num_blocks: int
) -> DecodeInputs:
    """Find them, from device tensors alone: fit for a CUDA graph.

    Args:
        rows: [2, R] int64: slots, and positions to compute; padding has the position -1 and computes position 0.
        token_ids: [S, L] int64, known tokens of each slot.
        block_tables: [S, blocks] int32, cache blocks of each slot.
        tokens_per_block: B.
        num_blocks: columns of the block tables that any row needs.
    """
    return IMPLEMENTATIONS[choose(rows.device)](rows, token_ids, block_tables, tokens_per_block, num_blocks)


def decode_inputs_torch(
    rows: torch.Tensor, token_ids: torch.Tensor, block_tables: torch.Tensor, tokens_per_block: int, num_blocks: int
) -> DecodeInputs:
    """The definition, a tensor operation each."""
    slots, starts = rows
    positions = starts.clamp(min=0)
    index = torch.arange(slots.shape[0] + 1, device=slots.device)
    blocks = block_tables[slots, positions // tokens_per_block].long()
    return DecodeInputs(
        input_ids=token_ids[slots, positions],
        positions=positions,
        next_positions=positions + 1,
        slot_mapping=blocks * tokens_per_block + positions % tokens_per_block,
        row_index=index[:-1],
        kv_lens=(starts + 1).int(),
        query_start=index.int(),
        block_tables=block_tables[:, :num_blocks][slots],
    )


def decode_inputs_triton(
    rows: torch.Tensor, token_ids: torch.Tensor, block_tables: torch.Tensor, tokens_per_block: int, num_blocks: int
) -> DecodeInputs:
    """All in one launch."""
    from tokenmill.ops.triton.decode_inputs import decode_inputs as find

    return DecodeInputs(*find(rows, token_ids, block_tables, tokens_per_block, num_blocks))


IMPLEMENTATIONS: Mapping[str, FindInputs] = MappingProxyType(
    {"torch": decode_inputs_torch, "triton": decode_inputs_triton}
)


def choose(device: torch.device) -> str:
    """Name of the implementation for tensors on this device."""
    return "triton" if device.type == "cuda" else "torch"
