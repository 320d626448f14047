"""`flashinfer`: attention over the paged cache by the FlashInfer library, where it is installed. `select.py` makes it.

The library wants to know a step's lengths on the host and plans how its kernels share the work: once a step for all
layers with the same heads, window and soft cap. Its plans are not part of a CUDA graph, so steps run eagerly. Keys and
values are written by our kernel; rows of one token and prompts go to a wrapper each.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.attention.triton_kv_write import write_kv_triton
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.ops.upload import upload

WORKSPACE_BYTES = 256 << 20
"""For partial results of split contexts; the library's documents advise half of it for heads of 128."""

LAYOUT = "NHD"
"""Of the cache: blocks [tokens, heads, D]."""


class LayerKind(NamedTuple):
    """What a plan is made for besides rows: layers that agree in this share it. `scale` excludes that of the cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    tokens_per_block: int
    dtype: torch.dtype
    cache_dtype: torch.dtype


class PagedRows(NamedTuple):
    """Consecutive rows of a step in the library's terms. int32, on the host but for `pages`.

    Args:
        query_start: [R + 1], row r's tokens among these rows' are query_start[r] to query_start[r + 1].
        page_start: [R + 1], row r's blocks are pages[page_start[r] : page_start[r + 1]].
        pages: blocks of the rows one after the other, on the device.
        last_page_len: [R], tokens in each row's last block.
    """

    query_start: torch.Tensor
    page_start: torch.Tensor
    pages: torch.Tensor
    last_page_len: torch.Tensor


class StepRows(NamedTuple):
    """The rows of one step: those of one token, and prompts; None where there are none."""

    metadata: AttentionMetadata
    decode: PagedRows | None
    prompts: PagedRows | None


@dataclass(slots=True)
class Wrappers:
    """The library's objects for one kind of layers, and the step that they are planned for."""

    decode: Any
    prompts: Any
    planned: AttentionMetadata | None = None
    uploaded: torch.cuda.Event | None = None


class FlashInferAttention:
    """Attention by FlashInfer.

    Raises:
        UnsupportedFeatureError: the library cannot be imported (`field` is `attn_backend`).
    """

    name = "flashinfer"

    def __init__(self) -> None:
        try:
            self._library: Any = import_module("flashinfer")
        except ImportError as error:
            raise UnsupportedFeatureError(
                f"The attention backend 'flashinfer' needs a package that cannot be imported: {error}.",
                field="attn_backend",
                remedy="Install it with `pip install 'tokenmill[flashinfer]'`, or leave attn_backend at 'auto'.",
            ) from error
        self._workspace: torch.Tensor | None = None
        self._wrappers: dict[LayerKind, Wrappers] = {}
        self._rows: StepRows | None = None
        self._lock = threading.Lock()  # first runs come from several threads, and a plan must be there until it has run

    def forward(
        self,
        spec: AttentionSpec,
        query: torch.Tensor,  # [T, H, D]
        key: torch.Tensor,  # [T, G, D]
        value: torch.Tensor,  # [T, G, D]
        cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:  # [T, H, D]
        """See `AttentionBackend.forward`. `metadata` must have `kv_lens_host`."""
        write_kv_triton(spec, key, value, cache, metadata.slot_mapping)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        num_decode = metadata.num_decode_rows
        key_scale = None if spec.key_scale == 1.0 else spec.key_scale
        with self._lock:
            wrappers = self._planned(_kind(spec, query, cache), metadata)
            if num_decode:
                tokens = slice(num_decode)
                wrappers.decode.run(query[tokens], cache, k_scale=key_scale, out=output[tokens])
            if num_decode < len(metadata.query_lens):
                tokens = slice(num_decode, None)
                wrappers.prompts.run(query[tokens], cache, k_scale=key_scale, out=output[tokens])
        return output if spec.value_scale == 1.0 else output.mul_(spec.value_scale)

    def _planned(self, kind: LayerKind, metadata: AttentionMetadata) -> Wrappers:
        """The wrappers of this kind, planned for this step."""
        device = metadata.kv_lens.device
        if kind not in self._wrappers:
            self._wrappers[kind] = self._make_wrappers(kind, device)
        wrappers = self._wrappers[kind]
        if wrappers.planned is not metadata:
            if self._rows is None or self._rows.metadata is not metadata:
                self._rows = step_rows(metadata, kind.tokens_per_block)
            if wrappers.uploaded is not None:
                wrappers.uploaded.synchronize()  # the plan before lies in the same pinned memory, until it is copied
            wrappers.planned = None
            self._plan(wrappers, kind, self._rows)
            wrappers.planned = metadata
            if device.type == "cuda":
                wrappers.uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
                wrappers.uploaded.record()
        return wrappers

    def _make_wrappers(self, kind: LayerKind, device: torch.device) -> Wrappers:
        if self._workspace is None:
            self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # Its kernels for Hopper multiply keys as they lie in the cache, so they need them in the queries' type.
        prompt_kernels = "auto" if kind.cache_dtype == kind.dtype else "fa2"
        return Wrappers(
            # Tensor cores suit any number of query heads for a key head; the other kernels know five.
            self._library.BatchDecodeWithPagedKVCacheWrapper(self._workspace, LAYOUT, use_tensor_cores=True),
            self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, LAYOUT, backend=prompt_kernels),
        )

    def _plan(self, wrappers: Wrappers, kind: LayerKind, rows: StepRows) -> None:
        scoring = {
            "sm_scale": kind.scale,
            "window_left": -1 if kind.sliding_window is None else kind.sliding_window - 1,  # the query not counted
            "logits_soft_cap": kind.soft_cap,
            "q_data_type": kind.dtype,
            "kv_data_type": kind.cache_dtype,
        }
        heads = kind.num_heads, kind.num_kv_heads, kind.head_dim, kind.tokens_per_block
        if rows.decode is not None:
            wrappers.decode.plan(
                rows.decode.page_start, rows.decode.pages, rows.decode.last_page_len, *heads, **scoring
            )
        if rows.prompts is not None:
            wrappers.prompts.plan(*rows.prompts, *heads, causal=True, **scoring)


def step_rows(metadata: AttentionMetadata, tokens_per_block: int) -> StepRows:
    """The rows of a step for both wrappers; does not wait for the device."""
    assert metadata.kv_lens_host, "the lengths must be known on the host"
    num_decode, num_rows = metadata.num_decode_rows, len(metadata.query_lens)
    decode = paged_rows(metadata, slice(0, num_decode), tokens_per_block) if num_decode else None
    prompts = paged_rows(metadata, slice(num_decode, num_rows), tokens_per_block) if num_decode < num_rows else None
    return StepRows(metadata, decode, prompts)


def paged_rows(metadata: AttentionMetadata, rows: slice, tokens_per_block: int) -> PagedRows:
    """Some rows of a step: lists of blocks without the padding of `metadata.block_tables`."""
    kv_lens = np.array(metadata.kv_lens_host[rows], np.int32)
    num_pages = -(-kv_lens // tokens_per_block)
    query_start, page_start = _starts(np.array(metadata.query_lens[rows], np.int32)), _starts(num_pages)
    tables = metadata.block_tables
    # Row r's block i lies in the flat table at r * width + i.
    offsets = np.arange(rows.start, rows.stop) * tables.shape[1] - page_start[:-1]
    index = np.arange(page_start[-1]) + offsets.repeat(num_pages)
    pages = tables.flatten()[upload(index, tables.device)]
    last_page_len = torch.from_numpy(kv_lens - (num_pages - 1) * tokens_per_block)
    return PagedRows(torch.from_numpy(query_start), torch.from_numpy(page_start), pages, last_page_len)


def _starts(lens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """[R] lengths to [R + 1]: where each begins, and the end."""
    starts = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens, out=starts[1:])
    return starts


def _kind(spec: AttentionSpec, query: torch.Tensor, cache: LayerCache) -> LayerKind:
    return LayerKind(
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        spec.scale,
        spec.sliding_window,
        spec.soft_cap,
        cache[0].shape[1],
        query.dtype,
        cache[0].dtype,
    )
