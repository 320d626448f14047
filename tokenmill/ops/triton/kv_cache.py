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


def copy_blocks(
    caches: Sequence[tuple[torch.Tensor, torch.Tensor]], source: torch.Tensor, destination: torch.Tensor
) -> None:
    """Copy block `source[i]` to block `destination[i]` in all caches ([N, B, G, D] each, of one shape and type).

    The tensors' addresses travel to the device with each call, so this is no part of a CUDA graph.
    """
    tensors = [tensor for cache in caches for tensor in cache]
    num_copies = source.shape[0]
    if num_copies == 0 or not tensors:
        return
    first = tensors[0]
    assert all(tensor.is_contiguous() and tensor.shape == first.shape for tensor in tensors), "caches differ in layout"
    bytes_per_block = first[0].numel() * first.element_size()
    assert bytes_per_block % 4 == 0, "a block must consist of whole words"
    addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
    words_per_block = bytes_per_block // 4
    block_words = min(WORDS_PER_PROGRAM, triton.next_power_of_2(words_per_block))
    grid = (num_copies, len(tensors), triton.cdiv(words_per_block, block_words))
    _copy_blocks_kernel[grid](
        addresses.to(first.device, non_blocking=True),
        source.contiguous(),
        destination.contiguous(),
        words_per_block,
        block_words=block_words,
    )
