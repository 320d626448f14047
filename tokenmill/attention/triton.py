"""`triton`: attention over the paged cache on NVIDIA GPUs. `select.py` makes it; layers call it.

Rows of one token go to the decode kernel, which also writes their keys and values; the rest are written by one launch
and attended to by another. A step of decode rows alone depends on the host only through shapes and `max_kv_len`: it can
be captured in a CUDA graph and replayed with other lengths, blocks and slots.
"""

from __future__ import annotations

import torch

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.attention.triton_common import Result
from tokenmill.attention.triton_decode import choose_num_splits, decode_attention, decode_tiles
from tokenmill.attention.triton_kv_write import write_kv_triton
from tokenmill.attention.triton_prefill import prefill_attention
from tokenmill.ops.platform import num_multiprocessors

INVARIANT_SPLIT_TOKENS = 512
"""Tokens of each part of a row's context when a row's result must not depend on the batch."""

LARGEST = 1 << 30


class TritonAttention:
    """Attention by Triton kernels.

    Args:
        batch_invariant: cut every row's context in the same places whatever else is in the batch, so that a decode row
            gives the same bits alone and in company. Costs speed in small batches.
    """

    name = "triton"

    def __init__(self, *, batch_invariant: bool = False) -> None:
        self.batch_invariant = batch_invariant

    def forward(
        self,
        spec: AttentionSpec,
        query: torch.Tensor,  # [T, H, D]
        key: torch.Tensor,  # [T, G, D]
        value: torch.Tensor,  # [T, G, D]
        cache: LayerCache,
        metadata: AttentionMetadata,
        *,
        sinks: torch.Tensor | None = None,  # [H]
    ) -> torch.Tensor:  # [T, H, D]
        """See `AttentionBackend.forward`. `sinks`: a learned score per head that takes probability and has no value."""
        assert metadata.block_tables.stride(-1) == 1, "block tables must be contiguous along the blocks"
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        num_decode = metadata.num_decode_rows
        if num_decode:
            rows = slice(num_decode)
            self._decode(spec, query[rows], key[rows], value[rows], cache, metadata, Result(output[rows], None, sinks))
        if len(metadata.query_lens) > num_decode:
            rows = slice(num_decode, None)
            keys, values = write_kv_triton(spec, key[rows], value[rows], cache, metadata.slot_mapping[rows])
            longest = LARGEST if self.batch_invariant else max(metadata.query_lens[rows])
            result = Result(output[rows], None, sinks)
            prefill_attention(spec, query[rows], keys, values, cache, metadata, result, max_query_len=longest)
        return output

    def _decode(
        self,
        spec: AttentionSpec,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        metadata: AttentionMetadata,
        result: Result,
    ) -> None:
        max_kv_len = metadata.kv_len_bound
        if spec.sliding_window is not None:
            max_kv_len = min(max_kv_len, spec.sliding_window)
        tiles = decode_tiles(spec.head_dim, cache[0].element_size())
        fixed = INVARIANT_SPLIT_TOKENS if self.batch_invariant else 0
        if fixed:  # a window may begin within a tile, which adds to its tokens
            num_splits = -(-(max_kv_len + tiles.block_n) // fixed)
        else:
            num_programs = query.shape[0] * spec.num_kv_heads
            num_splits = choose_num_splits(num_programs, max_kv_len, num_multiprocessors(query.device), tiles)
        decode_attention(
            spec,
            query,
            key,
            value,
            cache,
            metadata,
            result,
            num_splits=num_splits,
            fixed_split_tokens=fixed,
            tiles=tiles,
        )
