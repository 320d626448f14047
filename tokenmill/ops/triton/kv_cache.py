"""Copies of whole cache blocks, in every layer with one launch. Called by `ops.kv_cache`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

WORDS_PER_PROGRAM = 2048


@triton.jit
def _copy_blocks_kernel(
    addresses: tl.tensor,
    source: tl.tensor,
    destination: tl.tensor,
    words_per_block: int,
    block_words: tl.constexpr,
) -> None:
    """One program: `block_words` words of 4 bytes of one copy in one cache tensor."""
    cache = tl.load(addresses + tl.program_id(1)).to(tl.pointer_type(tl.int32))
    copy = tl.program_id(0)
    words = tl.program_id(2) * block_words + tl.arange(0, block_words)
    inside = words < words_per_block
    from_block = tl.load(source + copy) * words_per_block
    to_block = tl.load(destination + copy) * words_per_block
    tl.store(cache + to_block + words, tl.load(cache + from_block + words, mask=inside), mask=inside)


def copy_blocks(tensors: Sequence[torch.Tensor], source: torch.Tensor, destination: torch.Tensor) -> None:
    """Copy block `source[i]` to block `destination[i]` in all `tensors` [N, B, G, D], of one shape and type.

    The tensors' addresses travel to the device with each call, so this cannot be part of a CUDA graph.
    """
    num_copies = source.shape[0]
    if num_copies == 0 or not tensors:
        return
    first = tensors[0]
    bytes_per_block = first[0].numel() * first.element_size()
    assert all(tensor.is_contiguous() for tensor in tensors), "caches must be contiguous"
    assert bytes_per_block % 4 == 0, "a block must consist of whole words"
    addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
    words_per_block = bytes_per_block // 4
    block_words = min(WORDS_PER_PROGRAM, triton.next_power_of_2(words_per_block))
    _copy_blocks_kernel[(num_copies, len(tensors), triton.cdiv(words_per_block, block_words))](
        addresses.to(first.device, non_blocking=True),
        source.contiguous(),
        destination.contiguous(),
        words_per_block,
        block_words=block_words,
    )
