"""`cpu`: attention over the paged cache in a few fat torch operations a layer. Runs on every device; fast on CPUs.

All decode rows are gathered into one padded batch; prefill rows run one by one, straight on this step's keys when
nothing of them was cached before. What all layers share (which slots to gather, masks) is planned once a step for each
window size, from lengths that are known on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.ops.kv_cache import write_kv

QUERIES_PER_PIECE = 256
"""Queries of a masked prefill that are computed together: bounds the mask and skips keys that none of them sees."""

SHORTEST_GROUP = 256
"""Decode rows that see at most this many tokens are padded to a common length; longer ones at most double."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """R decode rows of similar length, padded to L visible tokens.

    Args:
        rows: [R] int64, which decode rows; None: all, in order.
        slots: [R * L] int64, where the visible tokens lie in the cache; padding repeats the row's last token.
        num_visible: L.
        mask: [R, 1, 1, L] added to the scores; None: nothing is padded.
    """

    rows: torch.Tensor | None
    slots: torch.Tensor
    num_visible: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillPiece:
    """Some queries of a row and the keys that they may see.

    Args:
        queries: in the tokens of the step.
        keys: in the keys of the row.
        mask: [queries, keys] added to the scores; None: plain causal from the first key on.
    """

    queries: slice
    keys: slice
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A row of several tokens.

    Args:
        tokens: in the tokens of the step.
        slots: [L] int64, where the keys that the row sees lie in the cache; None: the step's own keys are all.
        pieces: cover the row's queries.
    """

    tokens: slice
    slots: torch.Tensor | None
    pieces: tuple[PrefillPiece, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step's work for all layers with the same window."""

    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillRow, ...]


class CpuAttention:
    """Attention by gathering from the cache and torch's fused scaled-dot-product attention."""

    name = "cpu"

    def __init__(self) -> None:
        self._metadata: AttentionMetadata | None = None
        self._plans: dict[tuple[int | None, bool], StepPlan] = {}  # of the step that `_metadata` describes

    def forward(
        self,
        spec: AttentionSpec,
        query: torch.Tensor,  # [T, H, D]
        key: torch.Tensor,  # [T, G, D]
        value: torch.Tensor,  # [T, G, D]
        cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:  # [T, H, D]
        """See `AttentionBackend.forward`."""
        if spec.key_scale != 1.0 or spec.value_scale != 1.0:
            return self._forward_scaled(spec, query, key, value, cache, metadata)
        key_cache, value_cache = cache
        write_kv(key, value, key_cache, value_cache, metadata.slot_mapping)
        if key_cache.dtype != query.dtype:  # what is attended to must not depend on how the prompt is split over steps
            key, value = key.to(key_cache.dtype).to(query.dtype), value.to(value_cache.dtype).to(query.dtype)
        plan = self._plan(spec, metadata, tokens_per_block=key_cache.shape[1], dtype=query.dtype)
        num_decode = metadata.num_decode_rows
        if not plan.prefill and len(plan.decode) == 1:
            return _decode(spec, query, cache, plan.decode[0])
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for group in plan.decode:
            if group.rows is None:
                output[:num_decode] = _decode(spec, query[:num_decode], cache, group)
            else:
                output[group.rows] = _decode(spec, query[group.rows], cache, group)
        for row in plan.prefill:
            _prefill(spec, query, key[row.tokens], value[row.tokens], cache, row, output)
        return output

    def _forward_scaled(
        self,
        spec: AttentionSpec,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Attention is linear in the values and depends on the keys by products: the scales move out of the cache."""
        unscaled = replace(spec, scale=spec.scale * spec.key_scale, key_scale=1.0, value_scale=1.0)
        key, value = key.float() / spec.key_scale, value.float() / spec.value_scale
        return self.forward(unscaled, query, key, value, cache, metadata) * spec.value_scale

    def _plan(
        self, spec: AttentionSpec, metadata: AttentionMetadata, *, tokens_per_block: int, dtype: torch.dtype
    ) -> StepPlan:
        if self._metadata is not metadata:
            self._metadata = metadata
            self._plans = {}
        whole_causal = spec.soft_cap is None
        key = (spec.sliding_window, whole_causal)
        if key not in self._plans:
            self._plans[key] = plan_step(
                metadata, spec.sliding_window, tokens_per_block, dtype=dtype, whole_causal=whole_causal
            )
        return self._plans[key]


def plan_step(
    metadata: AttentionMetadata, window: int | None, tokens_per_block: int, *, dtype: torch.dtype, whole_causal: bool
) -> StepPlan:
    """Which slots every row reads, and the masks.

    Args:
        metadata: the step.
        window: of the layers that the plan is for.
        tokens_per_block: of the cache.
        dtype: of the masks.
        whole_causal: whether a prefill without cached tokens may be one causal piece of any length.
    """
    num_decode = metadata.num_decode_rows
    visible = [kv_len if window is None else min(kv_len, window) for kv_len in metadata.kv_lens_host[:num_decode]]
    groups = group_by_length(visible)
    decode = tuple(
        _plan_decode(metadata, group, [visible[row] for row in group], tokens_per_block, dtype) for group in groups
    )
    prefill, start, device = [], num_decode, metadata.block_tables.device
    for row in range(num_decode, len(metadata.query_lens)):
        query_len, kv_len = metadata.query_lens[row], metadata.kv_lens_host[row]
        slots: torch.Tensor | None = None
        if kv_len > query_len:
            if window is not None:  # leave out what not even the first query sees
                kv_len = min(kv_len, query_len + window - 1)
            positions = torch.arange(metadata.kv_lens_host[row] - kv_len, metadata.kv_lens_host[row], device=device)
            slots = _slots(metadata.block_tables[row], positions, tokens_per_block)
        pieces = _plan_pieces(query_len, kv_len, start, window, device, dtype, whole_causal)
        prefill.append(PrefillRow(slice(start, start + query_len), slots, pieces))
        start += query_len
    return StepPlan(decode, tuple(prefill))


def group_by_length(visible: Sequence[int]) -> list[list[int]]:
    """Rows in groups whose lengths lie within a factor of two, the shortest ones all together."""
    groups: dict[int, list[int]] = {}
    for row, num_visible in enumerate(visible):
        groups.setdefault((max(num_visible, SHORTEST_GROUP) - 1).bit_length(), []).append(row)
    return [groups[size] for size in sorted(groups)]


def _plan_decode(
    metadata: AttentionMetadata, group: list[int], visible: list[int], tokens_per_block: int, dtype: torch.dtype
) -> DecodeGroup:
    device = metadata.block_tables.device
    is_all = len(group) == metadata.num_decode_rows
    rows = None if is_all else torch.tensor(group, device=device)
    lens = metadata.kv_lens[: len(group)] if rows is None else metadata.kv_lens[rows]
    tables = metadata.block_tables[: len(group)] if rows is None else metadata.block_tables[rows]
    last = lens.long()[:, None] - 1  # [R, 1]
    longest = max(visible)
    seen = torch.tensor(visible, device=device)[:, None]
    offsets = torch.arange(longest, device=device)
    # Padding reads the row's own last token, so that no row ever touches another sequence's data.
    positions = torch.minimum(last - seen + 1 + offsets, last)  # [R, L]
    mask: torch.Tensor | None = None
    if min(visible) < longest:
        hidden = offsets >= seen
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)[:, None, None]
    return DecodeGroup(rows, _slots(tables, positions, tokens_per_block).flatten(), longest, mask)


def _plan_pieces(
    query_len: int,
    kv_len: int,
    start: int,
    window: int | None,
    device: torch.device,
    dtype: torch.dtype,
    whole_causal: bool,
) -> tuple[PrefillPiece, ...]:
    slides = window is not None and window < kv_len
    if query_len == kv_len and not slides and whole_causal:
        return (PrefillPiece(slice(start, start + query_len), slice(0, kv_len), None),)
    pieces = []
    for first in range(0, query_len, QUERIES_PER_PIECE):
        last = min(first + QUERIES_PER_PIECE, query_len)
        first_position, end_position = kv_len - query_len + first, kv_len - query_len + last
        first_key = max(0, first_position - window + 1) if window is not None else 0
        query_positions = torch.arange(first_position, end_position, device=device)[:, None]
        key_positions = torch.arange(first_key, end_position, device=device)
        hidden = key_positions > query_positions
        if window is not None:
            hidden |= key_positions <= query_positions - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        pieces.append(PrefillPiece(slice(start + first, start + last), slice(first_key, end_position), mask))
    return tuple(pieces)


def _slots(block_tables: torch.Tensor, positions: torch.Tensor, tokens_per_block: int) -> torch.Tensor:
    """Slots of positions [..., L] by block tables [..., blocks]; int64 of positions' shape."""
    blocks = block_tables.long().gather(-1, positions // tokens_per_block)
    return blocks * tokens_per_block + positions % tokens_per_block


def _gather(cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N, B, G, D] at slots [L] to [L, G, D] of type `dtype`."""
    num_kv_heads, head_dim = cache.shape[2:]
    rows = cache.view(-1, num_kv_heads * head_dim).index_select(0, slots)
    return rows.view(-1, num_kv_heads, head_dim).to(dtype)


def _decode(spec: AttentionSpec, query: torch.Tensor, cache: LayerCache, group: DecodeGroup) -> torch.Tensor:
    """query [R, H, D] of the group's rows; returns [R, H, D]."""
    num_rows, num_kv_heads, head_dim = query.shape[0], spec.num_kv_heads, spec.head_dim
    keys, values = (
        _gather(part, group.slots, query.dtype)
        .view(num_rows, group.num_visible, num_kv_heads, head_dim)
        .transpose(1, 2)
        for part in cache
    )
    # The heads that share a key/value head take the place of query positions: nothing is repeated.
    grouped = query.view(num_rows, num_kv_heads, -1, head_dim)
    return _attend(spec, grouped, keys, values, group.mask, is_causal=False).reshape(num_rows, -1, head_dim)


def _prefill(
    spec: AttentionSpec,
    query: torch.Tensor,  # [T, H, D]
    key: torch.Tensor,  # [query_len, G, D]
    value: torch.Tensor,
    cache: LayerCache,
    row: PrefillRow,
    output: torch.Tensor,  # [T, H, D], of which the row's tokens are written
) -> None:
    if row.slots is not None:
        key, value = (_gather(part, row.slots, query.dtype) for part in cache)
    keys, values = key.transpose(0, 1)[None], value.transpose(0, 1)[None]  # [1, G, L, D]
    for piece in row.pieces:
        queries = query[piece.queries].transpose(0, 1)[None]  # [1, H, Q, D]
        attended = _attend(
            spec,
            queries,
            keys[:, :, piece.keys],
            values[:, :, piece.keys],
            piece.mask,
            is_causal=piece.mask is None,
        )
        output[piece.queries] = attended[0].transpose(0, 1)


def _attend(
    spec: AttentionSpec,
    query: torch.Tensor,  # [batch, H, Q, D]
    keys: torch.Tensor,  # [batch, G, L, D]
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool,
) -> torch.Tensor:
    """[batch, H, Q, D]; H is a multiple of G."""
    if spec.soft_cap is None:
        return functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=is_causal,
            scale=spec.scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
    assert not is_causal, "the plan gives masks to layers with a soft cap"
    num_groups = keys.shape[1]
    grouped = query.view(query.shape[0], num_groups, -1, *query.shape[2:]).float()  # [batch, G, H / G, Q, D]
    scores = (grouped * spec.scale) @ keys.float().unsqueeze(2).transpose(-1, -2)
    scores = torch.tanh(scores / spec.soft_cap) * spec.soft_cap
    if mask is not None:
        scores = scores + mask.unsqueeze(1) if mask.dim() == 4 else scores + mask
    return (torch.softmax(scores, dim=-1) @ values.float().unsqueeze(2)).flatten(1, 2).to(query.dtype)
