"""Paged attention kernels against the reference backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch

from tests.support.native_cache import NativeCache, clear_partners, pack_cache, unpack_cache
from tests.support.native_ops import matrix, nans, run_equally, run_ops
from tests.support.paged_cache import PagedSequences
from tokenmill.attention.base import AttentionMetadata, AttentionSpec
from tokenmill.attention.reference import ReferenceAttention
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.ops.cpu.attention import AttentionOp, attention, attention_combine, partial_bytes, scratch_bytes
from tokenmill.ops.cpu.cache_layout import cache_shapes

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def attend(
    spec: AttentionSpec, query: torch.Tensor, cache: NativeCache, metadata: AttentionMetadata, num_threads: int
) -> torch.Tensor:
    """The kernels' result; query [T, H, D]."""
    flat, output = query.flatten(1).contiguous(), nans(query.shape[0], query[0].numel())
    scratch = nans(num_threads, scratch_bytes(spec.num_heads, spec.num_kv_heads, spec.head_dim) // 4)
    num_blocks = sum(-(-kv_len // cache.tokens_per_block) for kv_len in metadata.kv_lens_host)
    rows = len(metadata.query_lens)
    partials = nans(partial_bytes(spec.num_heads, spec.head_dim, cache.tokens_per_block, num_blocks, rows) // 4)
    op = AttentionOp(
        query=matrix(flat),
        output=matrix(output),
        cache=cache.location,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        scale=spec.scale,
        scratch=scratch.data_ptr(),
        partials=partials.data_ptr(),
        sliding_window=spec.sliding_window,
        soft_cap=spec.soft_cap,
    )
    ops = [(attention, op.arguments()), (attention_combine, op.arguments())]
    run_ops(ops, query.shape[0], num_threads)
    return output.view(query.shape)


def check_steps(
    spec: AttentionSpec,
    tokens_per_block: int,
    dtype: torch.dtype,
    steps: Sequence[list[tuple[str, int]]],
    tolerance: float | None = None,
) -> None:
    """Grow sequences over steps; every step must give what the reference gives. Unwritten cells are NaN."""
    torch.manual_seed(0)
    tolerance = tolerance or TOLERANCE[dtype]
    sequences = PagedSequences(
        num_layers=1,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        tokens_per_block=tokens_per_block,
        num_blocks=sum(count // tokens_per_block + 2 for rows in steps for _, count in rows) + 1,
        dtype=dtype,
    )
    for rows in steps:
        metadata = sequences.step(rows)
        tokens = sum(metadata.query_lens)
        query = torch.randn(tokens, spec.num_heads, spec.head_dim)
        key, value = torch.randn(2, tokens, spec.num_kv_heads, spec.head_dim).to(dtype).float()
        expected = ReferenceAttention().forward(spec, query, key, value, sequences.caches[0], metadata)
        if dtype == torch.bfloat16:
            clear_partners(sequences.caches[0], metadata)
        cache = NativeCache(sequences.caches[0], metadata)

        output = run_equally(partial(attend, spec, query, cache, metadata))
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.spec("E1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 1, 256), (5, 5, 8), (12, 2, 80), (7, 1, 24)]
)
def test_mixed_steps(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    steps = [
        [("b", 1), ("a", 70)],
        [("a", 1), ("b", 130), ("c", 33)],
        [("a", 1), ("b", 1), ("c", 2)],
        [("b", 1), ("c", 1), ("d", 20)],
    ]
    check_steps(AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5), 32, dtype, steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens_per_block", [1, 5, 16, 100])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (7, None), (50, 20.0)])
def test_blocks_windows_and_caps(
    dtype: torch.dtype, tokens_per_block: int, window: int | None, soft_cap: float | None
) -> None:
    steps = [[("a", 67), ("b", 5)], [("a", 1), ("b", 40)], [("a", 1), ("b", 1)]]
    check_steps(AttentionSpec(4, 2, 16, 0.3, window, soft_cap), tokens_per_block, dtype, steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 600])
def test_long_decode_rows_are_split_and_combined(dtype: torch.dtype, window: int | None) -> None:
    steps = [[("a", 1023), ("b", 511)], [("a", 1), ("b", 1), ("c", 1)], [("a", 1), ("b", 1), ("d", 3)]]
    check_steps(AttentionSpec(6, 2, 32, 0.2, window), 32, dtype, steps)


def test_large_scores_do_not_overflow() -> None:
    check_steps(AttentionSpec(2, 1, 16, 40.0), 16, torch.float32, [[("a", 40)], [("a", 1)]], tolerance=2e-4)


def test_rows_without_tokens_are_skipped() -> None:
    sequences = PagedSequences(num_layers=1, num_kv_heads=1, head_dim=16, num_blocks=8)
    metadata = sequences.step([("a", 1), ("b", 1), ("c", 3)])
    spec = AttentionSpec(2, 1, 16, 0.25)
    query, key, value = torch.randn(5, 2, 16), torch.randn(5, 1, 16), torch.randn(5, 1, 16)
    expected = ReferenceAttention().forward(spec, query, key, value, sequences.caches[0], metadata)
    metadata.kv_lens[1] = 0
    output = attend(spec, query, NativeCache(sequences.caches[0], metadata), metadata, 2)
    kept = [0, 2, 3, 4]
    torch.testing.assert_close(output[kept], expected[kept], rtol=2e-6, atol=2e-6)
    assert output[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_layout_keeps_every_value(dtype: torch.dtype) -> None:
    keys, values = torch.randn(3, 20, 2, 24).to(dtype), torch.randn(3, 20, 2, 24).to(dtype)
    packed = pack_cache(keys, values)
    assert tuple(part.shape for part in packed) == cache_shapes(3, 20, 2, 24, dtype)
    for part, expected in zip(unpack_cache(*packed, 20, 24), (keys, values), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize(("head_dim", "dtype"), [(12, torch.float32), (264, torch.float32), (64, torch.float16)])
def test_other_caches_are_refused(head_dim: int, dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedFeatureError, match="backend='torch'"):
        cache_shapes(1, 16, 1, head_dim, dtype)
