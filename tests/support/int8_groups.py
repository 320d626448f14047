"""Reads `int8_group32` buffers as their documentation in `tokenmill/ops/cpu/layout.py` says, in plain torch."""

from __future__ import annotations

import torch

from tokenmill.ops.cpu.layout import GROUP_BYTES, GROUP_SIZE, panel_width


def dequantized(buffer: torch.Tensor, tokens: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [tokens, groups, 32] and the stored sums [tokens, groups] of a buffer, uint8."""
    width, groups = panel_width(tokens), -(-columns // GROUP_SIZE)
    records = buffer.view(-1, groups, GROUP_BYTES * width)  # [panels, groups, bytes]
    values = records[..., : GROUP_SIZE * width].view(torch.int8).unflatten(-1, (8, width, 4))
    values = values.permute(0, 3, 1, 2, 4).reshape(-1, groups, GROUP_SIZE)[:tokens]
    numbers = records[..., GROUP_SIZE * width :].contiguous().view(torch.float32).unflatten(-1, (2, width))
    scales, sums = numbers.permute(2, 0, 3, 1).reshape(2, -1, groups)[:, :tokens]
    return values.float() * scales[..., None], sums
