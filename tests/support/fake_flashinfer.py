"""The part of FlashInfer's interface that tokenmill uses, by its documentation, in plain torch: it refuses arguments
that the library's kernels would misread, and computes in float32. `tests/attention/test_flashinfer.py` compares its
signatures with the real ones where the library is installed.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

Cache = tuple[torch.Tensor, torch.Tensor]


class _Wrapper:
    """Rows whose blocks are listed one after the other; planned any number of times."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"
        self.workspace = float_workspace_buffer
        self.num_plans = 0

    def _take(
        self,
        query_start: torch.Tensor,
        page_start: torch.Tensor,
        pages: torch.Tensor,
        last_page_len: torch.Tensor,
        heads: tuple[int, int, int],
        page_size: int,
        dtypes: tuple[torch.dtype, torch.dtype],
        window_left: int,
        logits_soft_cap: float | None,
        sm_scale: float,
        causal: bool,
    ) -> None:
        num_rows = len(last_page_len)
        for tensor, size in ((query_start, num_rows + 1), (page_start, num_rows + 1), (last_page_len, num_rows)):
            assert tensor.dtype == torch.int32 and tensor.shape == (size,) and tensor.device.type == "cpu"
        assert pages.dtype == torch.int32 and pages.shape == (int(page_start[-1]),)
        assert int(query_start[0]) == int(page_start[0]) == 0
        assert (query_start.diff() > 0).all() and (page_start.diff() > 0).all()
        assert ((last_page_len >= 1) & (last_page_len <= page_size)).all()
        assert window_left >= -1
        self.num_plans += 1
        self.query_start, self.page_start = query_start.tolist(), page_start.tolist()
        self.pages, self.last_page_len = pages.clone(), last_page_len.tolist()
        self.heads, self.page_size, self.dtypes = heads, page_size, dtypes
        self.window_left, self.soft_cap, self.scale, self.causal = window_left, logits_soft_cap, sm_scale, causal

    def _attend(self, q: torch.Tensor, paged_kv_cache: Cache, k_scale: float | None, out: torch.Tensor) -> torch.Tensor:
        num_heads, num_kv_heads, head_dim = self.heads
        keys, values = paged_kv_cache
        assert (q.dtype, keys.dtype) == self.dtypes and values.dtype == keys.dtype
        assert q.shape == (self.query_start[-1], num_heads, head_dim) and q.stride(2) == 1
        assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
        assert keys.shape[1:] == values.shape[1:] == (self.page_size, num_kv_heads, head_dim)
        for row, last in enumerate(self.last_page_len):
            pages = self.pages[self.page_start[row] : self.page_start[row + 1]].long()
            length = (len(pages) - 1) * self.page_size + last
            rows = slice(self.query_start[row], self.query_start[row + 1])
            row_keys, row_values = (
                part[pages].flatten(0, 1)[:length].float().repeat_interleave(num_heads // num_kv_heads, 1)
                for part in paged_kv_cache
            )
            scores = torch.einsum("qhd,khd->hqk", q[rows].float(), row_keys) * self.scale * (k_scale or 1.0)
            if self.soft_cap:
                scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
            position = torch.arange(length)
            query_position = position[length - (rows.stop - rows.start) :, None]
            hidden = self.causal & (position > query_position)
            if self.window_left >= 0:
                hidden = hidden | (position < query_position - self.window_left)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, row_values).to(out.dtype)
        return out


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    """Rows of one token."""

    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", use_tensor_cores: bool = False
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        assert use_tensor_cores, "without, groups of 1, 2, 3, 4 and 8 heads alone"

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int,
        logits_soft_cap: float | None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        self._take(
            torch.arange(len(indptr), dtype=torch.int32), indptr, indices, last_page_len,
            (num_qo_heads, num_kv_heads, head_dim), page_size, (q_data_type, kv_data_type), window_left,
            logits_soft_cap, sm_scale, causal=False,
        )  # fmt: skip

    def run(
        self, q: torch.Tensor, paged_kv_cache: Cache, *, k_scale: float | None = None, out: torch.Tensor
    ) -> torch.Tensor:
        return self._attend(q, paged_kv_cache, k_scale, out)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """Rows of any number of tokens, the last ones of their sequences."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", backend: str = "auto") -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        self.backend = backend

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float | None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert self.backend == "fa2" or q_data_type == kv_data_type, "Hopper's kernels read one type"
        self._take(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len,
            (num_qo_heads, num_kv_heads, head_dim_qk), page_size, (q_data_type, kv_data_type), window_left,
            logits_soft_cap, sm_scale, causal,
        )  # fmt: skip

    def run(
        self, q: torch.Tensor, paged_kv_cache: Cache, *, k_scale: float | None = None, out: torch.Tensor
    ) -> torch.Tensor:
        return self._attend(q, paged_kv_cache, k_scale, out)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import flashinfer` gives this module's classes until the test ends."""
    module: Any = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper
    module.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)
