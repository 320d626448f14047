"""Makes what the runner makes, from plain lists: block tables, attention metadata, forward batches."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from tokenmill.attention.base import AttentionMetadata, LayerCache
from tokenmill.layers.forward_batch import ForwardBatch


def attention_metadata(
    query_lens: Sequence[int], kv_lens: Sequence[int], block_tables: Sequence[Sequence[int]], tokens_per_block: int
) -> AttentionMetadata:
    """The metadata of one step. Rows of one token must come first."""
    num_decode_rows = sum(query_len == 1 for query_len in query_lens)
    assert all(query_len == 1 for query_len in query_lens[:num_decode_rows]), "rows of one token come first"
    width = max(len(table) for table in block_tables)
    slots = [
        table[position // tokens_per_block] * tokens_per_block + position % tokens_per_block
        for query_len, kv_len, table in zip(query_lens, kv_lens, block_tables, strict=True)
        for position in range(kv_len - query_len, kv_len)
    ]
    starts = [sum(query_lens[:row]) for row in range(len(query_lens) + 1)]
    return AttentionMetadata(
        query_start=torch.tensor(starts, dtype=torch.int32),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32),
        block_tables=torch.tensor([[*table, *[0] * (width - len(table))] for table in block_tables], dtype=torch.int32),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        num_decode_rows=num_decode_rows,
        query_lens=tuple(query_lens),
        kv_lens_host=tuple(kv_lens),
    )


class PagedSequences:
    """Sequences that grow in a paged cache whose blocks are handed out in random order.

    Unwritten cache entries are NaN: whoever reads beyond a sequence's own tokens fails loudly.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        tokens_per_block: int = 16,
        num_blocks: int = 128,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        shape = (num_blocks, tokens_per_block, num_kv_heads, head_dim)
        self.caches: tuple[LayerCache, ...] = tuple(
            (torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))
            for _ in range(num_layers)
        )
        self.tokens_per_block = tokens_per_block
        self._free = list(range(1, num_blocks))  # block 0 is for padding
        random.Random(seed).shuffle(self._free)
        self._tables: dict[str, list[int]] = {}
        self._lens: dict[str, int] = {}

    def step(self, rows: Sequence[tuple[str, int]]) -> AttentionMetadata:
        """Grow each named sequence by a number of tokens (rows of one token first); the step's metadata."""
        for name, num_tokens in rows:
            table = self._tables.setdefault(name, [])
            self._lens[name] = self._lens.get(name, 0) + num_tokens
            while len(table) * self.tokens_per_block < self._lens[name]:
                table.append(self._free.pop())
        names = [name for name, _ in rows]
        return attention_metadata(
            [num_tokens for _, num_tokens in rows],
            [self._lens[name] for name in names],
            [self._tables[name] for name in names],
            self.tokens_per_block,
        )

    def batch(self, rows: Sequence[tuple[str, Sequence[int]]]) -> ForwardBatch:
        """Append token ids to each named sequence (rows of one token first); what the model takes."""
        metadata = self.step([(name, len(token_ids)) for name, token_ids in rows])
        positions = [
            position
            for query_len, kv_len in zip(metadata.query_lens, metadata.kv_lens_host, strict=True)
            for position in range(kv_len - query_len, kv_len)
        ]
        return ForwardBatch(
            input_ids=torch.tensor([token for _, token_ids in rows for token in token_ids], dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int64),
            attention=metadata,
            caches=self.caches,
        )
