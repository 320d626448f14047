"""`triton`: attention over the paged cache on NVIDIA GPUs. `select.py` makes it; layers call it.

Rows of one token go to the decode kernel, which also writes their keys and values; the rest are written by one launch
and attended to by one or two others. A step of decode rows alone, or one with `RowParts`, depends on the host only
through shapes and `max_kv_len`: it can be captured in a CUDA graph and replayed with other lengths, blocks and slots.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.attention.triton_common import HeadNorms, Result, Turning
from tokenmill.attention.triton_decode import decode_attention
from tokenmill.attention.triton_decode_heads import decode_attention_of_heads
from tokenmill.attention.triton_decode_rows import QuantizedResult
from tokenmill.attention.triton_decode_tiles import DecodeTiles, choose_num_splits, decode_tiles
from tokenmill.attention.triton_invariant import invariant_attention
from tokenmill.attention.triton_kv_write import write_float8_kv, write_kv_triton
from tokenmill.attention.triton_prefill import prefill_attention
from tokenmill.attention.triton_prefill_float8 import multiplies_prompts, prompts_attention
from tokenmill.ops.platform import is_hopper, num_multiprocessors
from tokenmill.ops.triton.fp8 import new_quantized
from tokenmill.ops.triton.launch import is_interpreted


def first_row_without_history(metadata: AttentionMetadata) -> int:
    """The first of the rows at the end of a step that have no cached tokens from before, as far as the host knows."""
    row = len(metadata.query_lens)
    if metadata.kv_lens_host:
        while row > metadata.num_decode_rows and metadata.kv_lens_host[row - 1] == metadata.query_lens[row - 1]:
            row -= 1
    return row


def max_visible(spec: AttentionSpec, metadata: AttentionMetadata) -> int:
    """No query sees more cached tokens."""
    bound = metadata.kv_len_bound
    return bound if spec.sliding_window is None else min(bound, spec.sliding_window)


def decode_tiles_of(spec: AttentionSpec, cache: LayerCache, metadata: AttentionMetadata, num_rows: int) -> DecodeTiles:
    """How decode attention of the step is cut."""
    keys = cache[0]
    return decode_tiles(
        spec.head_dim,
        keys.element_size(),
        num_rows,
        spec.num_kv_heads,
        keys.shape[1],
        max_visible(spec, metadata),
        num_multiprocessors(keys.device),
    )


def groups_of_prompts(metadata: AttentionMetadata) -> Iterator[tuple[AttentionMetadata, slice, bool]]:
    """Rows of prompts that have history and rows that have none, each if there are any; as far as the host knows."""
    first, num_rows = metadata.num_decode_rows, len(metadata.query_lens)
    if metadata.parts is None:
        first_new = first_row_without_history(metadata)
        groups = ((metadata, slice(first, first_new)), (metadata, slice(first_new, num_rows)))
    else:
        groups = ((metadata.parts.with_history, slice(None)), (metadata.parts.without_history, slice(None)))
    for (group, rows), has_history in zip(groups, (True, False), strict=True):
        if group.query_lens[rows]:
            yield group, rows, has_history


def multiplies_float8(spec: AttentionSpec, query: torch.Tensor, cache: LayerCache, result: Result) -> bool:
    """Whether prompts are attended to in float8: with a float8 cache and queries of 16 bits, on Hopper.

    The interpreter does so as well, as far as it can.
    """
    is_float8 = cache[0].dtype.itemsize == 1 and query.dtype.itemsize == 2
    return is_float8 and multiplies_prompts(spec, result) and (is_interpreted() or is_hopper(query.device))


class TritonAttention:
    """Attention by Triton kernels.

    Args:
        batch_invariant: give a token the same bits whatever else is in the batch, in a prompt or in decode, with its
            context cached or not (`triton_invariant`). Costs speed.
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
        turning: tuple[torch.Tensor, torch.Tensor] | None = None,  # [T, 1, D] each
    ) -> torch.Tensor:  # [T, H, D]
        """See `AttentionBackend.forward` and `TurnsHeads.forward`.

        `sinks`: a learned score per head that takes probability and has no value.
        """
        assert metadata.block_tables.stride(-1) == 1, "block tables must be contiguous along the blocks"
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self.batch_invariant:
            invariant_attention(spec, query, key, value, cache, metadata, Result(output, None, sinks))
            return output
        angles = None if turning is None else Turning(*turning)
        result = Result(output, None, sinks)
        has_prompts = len(metadata.query_lens) > metadata.num_decode_rows
        if has_prompts:
            in_float8 = multiplies_float8(spec, query, cache, result)
            write = write_float8_kv if in_float8 else write_kv_triton
            keys, values = write(spec, key, value, cache, metadata.slot_mapping, angles)
        decode = metadata if metadata.parts is None else metadata.parts.decode
        if decode.num_decode_rows:
            rows = slice(decode.num_decode_rows)
            of_rows = Result(output[rows], None, sinks)
            self._decode(spec, query[rows], key[rows], value[rows], angles, cache, decode, of_rows)
        if has_prompts:  # behind the decode rows: some that pad them have written to prompts' results
            attend = self._prefill_in_float8 if in_float8 else self._prefill
            attend(spec, query, angles, keys, values, cache, metadata, result)
        return output

    def turns_heads(self, metadata: AttentionMetadata) -> bool:
        """All but invariant rows: each query and each key is loaded once, so turning it there saves a pass of its own.

        A last bit may differ from `ops.rope`.
        """
        return not self.batch_invariant

    def fuses(self, spec: AttentionSpec, cache: LayerCache, metadata: AttentionMetadata) -> bool:
        """Steps of many decode rows alone with a float8 cache, see `triton_decode_heads`."""
        if self.batch_invariant or metadata.parts is not None or cache[0].element_size() != 1:
            return False
        num_rows = metadata.num_decode_rows
        if num_rows == 0 or len(metadata.query_lens) != num_rows:
            return False
        return decode_tiles_of(spec, cache, metadata, num_rows).kv_heads is not None

    def forward_fused(
        self,
        spec: AttentionSpec,
        qkv: torch.Tensor,  # [T, H + 2 G, D]
        turning: tuple[torch.Tensor, torch.Tensor],
        norm: tuple[torch.Tensor, torch.Tensor, float] | None,
        cache: LayerCache,
        metadata: AttentionMetadata,
        *,
        quantizes: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See `FusesDecode.forward_fused`."""
        num_rows, tiles = qkv.shape[0], decode_tiles_of(spec, cache, metadata, qkv.shape[0])
        query, key, value = torch.split(qkv, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], 1)
        output = torch.empty(query.shape, dtype=qkv.dtype, device=qkv.device)
        quantized = None
        if quantizes and tiles.kv_heads == spec.num_kv_heads:
            quantized = QuantizedResult(*new_quantized(num_rows, spec.num_heads * spec.head_dim, qkv.device))
        decode_attention_of_heads(
            spec,
            query,
            key,
            value,
            cache,
            metadata,
            Result(output),
            tiles=tiles,
            turning=Turning(*turning),
            norms=None if norm is None else HeadNorms(*norm),
            quantized_result=quantized,
        )
        return output.flatten(1) if quantized is None else (quantized.float8, quantized.scales)

    def _prefill(
        self,
        spec: AttentionSpec,
        query: torch.Tensor,
        turning: Turning | None,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        metadata: AttentionMetadata,
        result: Result,
    ) -> None:
        """Rows with history and rows without it in a launch each, as far as those without stand at the end."""
        for group, rows, has_history in groups_of_prompts(metadata):
            prefill_attention(
                spec, query, key, value, cache, group, result, rows=rows, has_history=has_history, turning=turning
            )

    def _prefill_in_float8(
        self,
        spec: AttentionSpec,
        query: torch.Tensor,
        turning: Turning | None,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        metadata: AttentionMetadata,
        result: Result,
    ) -> None:
        """As `_prefill`. Rows with history multiply queries and keys in float8, those without it everything."""
        for group, rows, has_history in groups_of_prompts(metadata):
            if has_history or is_interpreted():
                prefill_attention(
                    spec, query, None, None, cache, group, result, rows=rows, has_history=True, turning=turning
                )
            else:
                prompts_attention(spec, query, key, value, group, result.output, rows=rows, turning=turning)

    def _decode(
        self,
        spec: AttentionSpec,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        turning: Turning | None,
        cache: LayerCache,
        metadata: AttentionMetadata,
        result: Result,
    ) -> None:
        num_rows = query.shape[0]
        tiles = decode_tiles_of(spec, cache, metadata, num_rows)
        bounds = max_visible(spec, metadata), num_multiprocessors(query.device)
        num_splits = choose_num_splits(num_rows * spec.num_kv_heads, *bounds, tiles)
        decode_attention(
            spec, query, key, value, cache, metadata, result, num_splits=num_splits, tiles=tiles, turning=turning
        )
