"""Decode attention with a warp for each of several key/value heads, against the definition in `reference.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.attention_steps import FP8, TOLERANCES, Case, assert_close, assert_same_cache, make_step
from tokenmill.attention.reference import ReferenceAttention
from tokenmill.ops.rope import apply_rope_reference

pytest.importorskip("triton")
from tokenmill.attention.triton_common import Result, Turning
from tokenmill.attention.triton_decode import decode_attention
from tokenmill.attention.triton_decode_tiles import DecodeTiles, choose_num_splits, decode_tiles

ROWS = ((1, 20), (1, 0), (1, 64), (1, 77))
CASES = [
    (Case(ROWS, num_heads=8, num_kv_heads=4, head_dim=32), 4, 16),
    (Case(ROWS, num_heads=4, num_kv_heads=4, head_dim=16), 2, 16),
    (Case(ROWS, num_heads=6, num_kv_heads=2, head_dim=64, tokens_per_block=32, soft_cap=2.0), 2, 16),
    (Case(ROWS, num_heads=4, num_kv_heads=2, head_dim=16, window=20), 1, 16),
    (Case(ROWS, num_heads=17, num_kv_heads=1, head_dim=16), 1, 16),
    (Case(ROWS, num_heads=8, num_kv_heads=4, head_dim=32, dtype=torch.bfloat16, tokens_per_block=32), 2, 16),
    (Case(ROWS, num_heads=8, num_kv_heads=4, dtype=torch.bfloat16, tokens_per_block=32, cache_dtype=FP8), 4, 32),
    (Case(ROWS, num_heads=8, num_kv_heads=2, dtype=torch.bfloat16, cache_dtype=FP8, window=9, soft_cap=3.0), 2, 16),
    (Case(ROWS, num_heads=4, num_kv_heads=2, cache_dtype=FP8, key_scale=0.5, value_scale=0.0625), 2, 16),
]
REAL_ROWS = ((1, 8191), (1, 0), (1, 1023), (1, 1100), (1, 63))
REAL = Case(REAL_ROWS, num_heads=32, num_kv_heads=8, head_dim=128, tokens_per_block=32, dtype=torch.bfloat16)
REAL_CASES = [
    pytest.param(case, kv_heads, block_n, marks=pytest.mark.gpu)
    for case, kv_heads, block_n in (
        (replace(REAL, cache_dtype=FP8), 2, 32),
        (replace(REAL, cache_dtype=FP8, num_kv_heads=4), 2, 32),
        (replace(REAL, cache_dtype=FP8, num_kv_heads=4, key_scale=0.5, value_scale=0.25), 4, 16),
        (REAL, 4, 16),
        (replace(REAL, window=1000, soft_cap=5.0), 2, 16),
        (replace(REAL, num_heads=9, num_kv_heads=3, head_dim=64, dtype=torch.float16), 1, 32),
    )
]


def tiles_of(kv_heads: int, block_n: int) -> DecodeTiles:
    return DecodeTiles(block_n, kv_heads, 3, 1, kv_heads=kv_heads)


@pytest.mark.spec("E1")
@pytest.mark.parametrize(("case", "kv_heads", "block_n"), [*CASES, *REAL_CASES], ids=str)
def test_equals_the_reference(case: Case, kv_heads: int, block_n: int, device: str) -> None:
    step = make_step(case, device)
    cache, expected_cache = step.cloned_cache(), step.cloned_cache()
    expected = ReferenceAttention().forward(step.spec, step.query, step.key, step.value, expected_cache, step.metadata)
    output = torch.full_like(expected, torch.nan)
    decode_attention(
        step.spec, step.query, step.key, step.value, cache, step.metadata, Result(output),
        num_splits=1, tiles=tiles_of(kv_heads, block_n),
    )  # fmt: skip
    assert_same_cache(cache, expected_cache)
    tolerance = max(TOLERANCES[case.dtype], TOLERANCES[torch.float16] if case.cache_dtype == FP8 else 0.0)
    assert_close(output, expected, tolerance)


@pytest.mark.parametrize("cache_dtype", [None, FP8], ids=str)
def test_queries_and_keys_turned_on_the_way_sinks_and_sums(cache_dtype: torch.dtype | None, device: str) -> None:
    """As the kernel of one head for all warps computes them, which has tests of its own."""
    step = make_step(Case(ROWS, num_heads=8, num_kv_heads=4, cache_dtype=cache_dtype), device)
    turns = torch.randn(len(ROWS), 1, 32, generator=torch.Generator().manual_seed(5)).to(device)
    angles = torch.cat([turns.cos()] * 2, -1), torch.cat([-turns.sin(), turns.sin()], -1)
    sinks = torch.linspace(-2.0, 3.0, 8, device=device)
    found = []
    for tiles in (DecodeTiles(16, 4, 2, 4), tiles_of(2, 16)):
        cache = step.cloned_cache()
        output = torch.full_like(step.query, torch.nan, memory_format=torch.contiguous_format)
        sums = torch.full(output.shape[:2], torch.nan, device=device)
        decode_attention(
            step.spec, step.query, step.key, step.value, cache, step.metadata, Result(output, sums, sinks),
            num_splits=1, tiles=tiles, turning=Turning(*angles),
        )  # fmt: skip
        found.append((output, sums, cache))
    (expected, expected_sums, expected_cache), (output, sums, cache) = found
    assert_same_cache(cache, expected_cache)
    assert_close(output, expected, TOLERANCES[torch.float16 if cache_dtype == FP8 else torch.float32])
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-5)
    if cache_dtype is None:
        written = cache[0].flatten(0, 1)[step.metadata.slot_mapping]
        torch.testing.assert_close(written, apply_rope_reference(step.key, *angles), rtol=1e-5, atol=1e-6)


def test_a_padding_row_reads_nothing_and_writes_to_its_slot(device: str) -> None:
    """Length 0, slot in scratch block 0, a table of nonsense; what lies in the cache may be NaN."""
    step = make_step(Case(((1, 20), (1, 5)), num_kv_heads=2), device)
    metadata = replace(
        step.metadata,
        kv_lens=torch.tensor([21, 0], dtype=torch.int32, device=device),
        slot_mapping=torch.cat([step.metadata.slot_mapping[:1], torch.zeros(1, dtype=torch.int64, device=device)]),
    )
    metadata.block_tables[1] = 1 << 28
    metadata.block_tables[1, 0] = 0
    cache = step.cloned_cache()
    output = torch.full_like(step.query, torch.nan, memory_format=torch.contiguous_format)
    decode_attention(
        step.spec, step.query, step.key, step.value, cache, metadata, Result(output),
        num_splits=1, tiles=tiles_of(2, 16),
    )  # fmt: skip
    assert output.isfinite().all()
    torch.testing.assert_close(cache[0][0, 0], step.key[1], rtol=0, atol=0)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("cache_itemsize", [1, 2, 4])
@pytest.mark.parametrize(("head_dim", "tokens_per_block"), [(128, 32), (128, 16), (64, 32), (80, 32), (128, 48)])
def test_tiles_that_are_chosen_can_be_launched(
    num_kv_heads: int, cache_itemsize: int, head_dim: int, tokens_per_block: int
) -> None:
    chosen = set()
    for num_rows in (1, 8, 17, 33, 48, 64, 100, 250, 512):
        tiles = decode_tiles(head_dim, cache_itemsize, num_rows, num_kv_heads, tokens_per_block, 8192, 132)
        chosen.add(tiles.kv_heads)
        if tiles.kv_heads is not None:
            assert tiles.num_warps == tiles.kv_heads and num_kv_heads % tiles.kv_heads == 0
            assert tokens_per_block % tiles.block_n == 0
            assert choose_num_splits(num_rows * num_kv_heads, 8192, 132, tiles) == 1
    assert (2 in chosen) == (head_dim == 128 and tokens_per_block == 32 and cache_itemsize < 4 and not num_kv_heads % 2)


@pytest.mark.parametrize(
    ("cache_itemsize", "num_kv_heads", "num_rows"), [(1, 8, 47), (1, 4, 93), (2, 8, 63), (2, 4, 126)]
)
def test_rows_from_which_on_programs_take_two_heads(cache_itemsize: int, num_kv_heads: int, num_rows: int) -> None:
    sizes = [decode_tiles(128, cache_itemsize, rows, num_kv_heads, 32, 4096, 132) for rows in (num_rows, num_rows - 1)]
    assert [tiles.kv_heads for tiles in sizes] == [2, None]


@pytest.mark.parametrize("cache_itemsize", [1, 2])
@pytest.mark.parametrize("num_kv_heads", [2, 4, 8])
def test_rows_of_which_programs_take_whole_ones(cache_itemsize: int, num_kv_heads: int) -> None:
    rows = (250, 251, 256, 264, 265)
    sizes = [decode_tiles(128, cache_itemsize, count, num_kv_heads, 32, 4096, 132).kv_heads for count in rows]
    has_whole = num_kv_heads == 4 and cache_itemsize == 1
    assert [kv_heads == 4 for kv_heads in sizes] == [False, has_whole, has_whole, has_whole, False]
