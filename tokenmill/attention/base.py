"""What attention needs to know of a step (`AttentionMetadata`), of a layer (`AttentionSpec`), and what a backend is.

Shapes: T tokens of the step, R rows (sequences), H query heads, G key/value heads, D head size, N cache blocks,
B tokens per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch

LayerCache: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer: two tensors [N, B, G, D]."""


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What is fixed about one attention layer.

    Args:
        num_heads: query heads H (of this rank).
        num_kv_heads: key/value heads G (of this rank); divides H.
        head_dim: D.
        scale: factor on the scores.
        sliding_window: a query sees at most this many of the latest positions, itself included; None: all.
        soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`; None: unchanged.
        key_scale, value_scale: the cache holds keys and values divided by these (float8 caches).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One step as attention sees it. Rows of one token (decode) come first. Computed once a step, used by all layers.

    Args:
        query_start: [R + 1] int32, row r's tokens are query_start[r] to query_start[r + 1].
        kv_lens: [R] int32, cached tokens of the row including this step's; the row's last query is at kv_len - 1.
        block_tables: [R, max_blocks_of_any_row] int32.
        slot_mapping: [T] int64, where each token's key and value go: block * tokens_per_block + offset.
        num_decode_rows: rows of exactly one token, at the front.
        query_lens: the rows' token counts, on the host.
        kv_lens_host: `kv_lens` on the host; may be empty where `max_kv_len` is given and the backend needs no more.
        max_kv_len: upper bound of `kv_lens`; None: their maximum.
        parts: the same rows, told apart on the device; a backend that knows it needs no more. None: the host knows.

    A CUDA graph captured from a step holds all that the host knew then (shapes, `num_decode_rows`, `query_lens`,
    `max_kv_len`) and reads the tensors anew: with decode rows only it can be replayed for any lengths up to
    `max_kv_len`. A row with `kv_lens` 0 pads the batch: its slot lies in scratch block 0, its result means nothing.
    """

    query_start: torch.Tensor
    kv_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    num_decode_rows: int
    query_lens: tuple[int, ...]
    kv_lens_host: tuple[int, ...]
    max_kv_len: int | None = None
    parts: RowParts | None = None

    @property
    def kv_len_bound(self) -> int:
        """No row has more cached tokens."""
        return max(self.kv_lens_host) if self.max_kv_len is None else self.max_kv_len


@dataclass(frozen=True, slots=True)
class RowParts:
    """The rows of a step by what takes them, each part with as many rows as it has at most: for CUDA graphs.

    Which rows of the step a part has is known on the device alone; `query_start` counts all tokens of the step. Rows
    that pad a part have no tokens.

    Args:
        decode: rows of one token, the step's first; row r is token r. A row that pads has length 0 and writes to
            scratch block 0; its token is another row's, whose result must be written later.
        with_history: rows of several tokens, of which any may have cached tokens from before.
        without_history: rows of several tokens that have none; the step's last.
    """

    decode: AttentionMetadata
    with_history: AttentionMetadata
    without_history: AttentionMetadata


class AttentionBackend(Protocol):
    """Reads and writes the paged cache. Stateless between steps; may keep per-step work keyed by the metadata."""

    name: str

    def forward(
        self,
        spec: AttentionSpec,
        query: torch.Tensor,  # [T, H, D]
        key: torch.Tensor,  # [T, G, D]
        value: torch.Tensor,  # [T, G, D]
        cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:  # [T, H, D]
        """Write key and value to the cache at `slot_mapping`, then attend causally over each row's cached tokens.

        Nothing but the row's own tokens may touch its result: what else lies in a block can be anything, NaN included.
        """
        ...


@runtime_checkable
class TurnsHeads(Protocol):
    """An `AttentionBackend` that applies the rotary embedding itself where that is faster."""

    def turns_heads(self, metadata: AttentionMetadata) -> bool:
        """Whether it does so in this step."""
        ...

    def forward(
        self,
        spec: AttentionSpec,
        query: torch.Tensor,  # [T, H, D]
        key: torch.Tensor,  # [T, G, D]
        value: torch.Tensor,  # [T, G, D]
        cache: LayerCache,
        metadata: AttentionMetadata,
        *,
        turning: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:  # [T, H, D]
        """`AttentionBackend.forward` of queries and keys that `ops.rope.apply_rope` has not turned yet by `turning`."""
        ...


@runtime_checkable
class FusesDecode(Protocol):
    """An `AttentionBackend` that does what stands around attention inside it, in some steps of decode rows."""

    def fuses(self, spec: AttentionSpec, cache: LayerCache, metadata: AttentionMetadata) -> bool:
        """Whether `forward_fused` can be called in this step."""
        ...

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
        """`ops.head_norm.norm_and_rope` (without a norm `ops.rope.apply_rope`), then `AttentionBackend.forward`.

        A last bit of a query or key may differ from those ops.

        Args:
            spec: of the layer.
            qkv: heads of queries, keys and values.
            turning: see `ops.rope.apply_rope`.
            norm: factors of query and key heads, and `eps`; None: no norm.
            cache: of the layer.
            metadata: of the step.
            quantizes: whether the rows are given to `ops.fp8.per_token_quantize_fp8` then.

        Returns:
            Rows [T, H * D]; quantized ones as values and scales.
        """
        ...
