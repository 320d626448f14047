"""What a step of one token for each row reads, in one launch. Called by `ops.decode_inputs`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_COLUMNS = 1024
"""Entries of a block table that are copied at a time."""


@triton.jit(do_not_specialize=["num_rows"])
def _decode_inputs_kernel(
    rows: tl.tensor,
    token_ids: tl.tensor,
    block_tables: tl.tensor,
    found: tl.tensor,
    kv_lens: tl.tensor,
    query_start: tl.tensor,
    tables: tl.tensor,
    num_rows: int,
    token_stride: int,
    table_stride: int,
    tokens_per_block: tl.constexpr,
    num_blocks: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program a row."""
    row = tl.program_id(0)
    slot, start = tl.load(rows + row), tl.load(rows + num_rows + row)
    position = tl.maximum(start, 0)
    table = block_tables + slot * table_stride
    address = tl.load(table + position // tokens_per_block).to(tl.int64) * tokens_per_block
    tl.store(found + row, tl.load(token_ids + slot * token_stride + position))
    tl.store(found + num_rows + row, position)
    tl.store(found + 2 * num_rows + row, position + 1)
    tl.store(found + 3 * num_rows + row, address + position % tokens_per_block)
    tl.store(found + 4 * num_rows + row, row.to(tl.int64))
    tl.store(kv_lens + row, (start + 1).to(tl.int32))
    tl.store(query_start + row + 1, row + 1)
    if row == 0:
        tl.store(query_start, 0)
    columns = tl.arange(0, block)
    for first in range(0, num_blocks, block):
        inside = first + columns < num_blocks
        blocks = tl.load(table + first + columns, mask=inside, other=0)
        tl.store(tables + row.to(tl.int64) * num_blocks + first + columns, blocks, mask=inside)


def decode_inputs(
    rows: torch.Tensor, token_ids: torch.Tensor, block_tables: torch.Tensor, tokens_per_block: int, num_blocks: int
) -> tuple[torch.Tensor, ...]:
    """The fields of `ops.decode_inputs.DecodeInputs`, in their order; arguments as there."""
    num_rows, device = rows.shape[1], rows.device
    assert rows.is_contiguous() and token_ids.stride(1) == block_tables.stride(1) == 1
    found = torch.empty(5, num_rows, dtype=torch.int64, device=device)
    kv_lens = torch.empty(num_rows, dtype=torch.int32, device=device)
    query_start = torch.empty(num_rows + 1, dtype=torch.int32, device=device)
    tables = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=device)
    _decode_inputs_kernel[(num_rows,)](
        rows,
        token_ids,
        block_tables,
        found,
        kv_lens,
        query_start,
        tables,
        num_rows,
        token_ids.stride(0),
        block_tables.stride(0),
        tokens_per_block=tokens_per_block,
        num_blocks=num_blocks,
        block=min(MAX_COLUMNS, triton.next_power_of_2(num_blocks)),
        num_warps=1,
    )
    return (*found.unbind(0), kv_lens, query_start, tables)
