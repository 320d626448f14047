"""Rotary embedding inside the Triton backend's kernels, of decode rows and of prompts, against turning before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.attention_steps import (
    FP8,
    MIXED,
    REAL,
    TOLERANCES,
    Case,
    assert_close,
    assert_same_cache,
    device_rows,
    make_step,
)
from tokenmill.attention.reference import ReferenceAttention
from tokenmill.ops.rope import apply_rope_reference
from tokenmill.runtime.step_inputs import inputs_of_prompts

pytest.importorskip("triton")
from tests.support.float8_attention import in_float8
from tokenmill.attention.triton import TritonAttention
from tokenmill.attention.triton_common import Result, Turning
from tokenmill.attention.triton_decode import decode_attention
from tokenmill.attention.triton_decode_tiles import DecodeTiles


def random_angles(num_tokens: int, head_dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines [T, 1, D]."""
    turns = torch.randn(num_tokens, 1, head_dim // 2, generator=torch.Generator().manual_seed(5)).to(device)
    cos, sin = turns.cos(), turns.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def tolerance_of(case: Case, device: str) -> float:
    tolerance = max(TOLERANCES[case.dtype], TOLERANCES[torch.float16] if case.cache_dtype == FP8 else 0.0)
    tolerance = tolerance if device == "cuda" or case.dtype == torch.float32 else 2 * tolerance  # cuts bfloat16 off
    # A last digit of a float8 key decides between two of its numbers.
    return 3 * tolerance if case.cache_dtype == FP8 else tolerance


TURNED_ROWS = ((1, 70), (1, 0), (1, 33))
TURNED = [
    Case(TURNED_ROWS),
    Case(TURNED_ROWS, num_heads=3, num_kv_heads=1, head_dim=48, dtype=torch.bfloat16),
    Case(TURNED_ROWS, dtype=torch.bfloat16, cache_dtype=FP8),
    pytest.param(replace(REAL, rows=((1, 8191), (1, 0), (1, 1023))), marks=pytest.mark.gpu),
    pytest.param(replace(REAL, rows=((1, 700),) * 70, cache_dtype=FP8), marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("case", TURNED, ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_rows_are_turned_on_the_way(case: Case, num_splits: int, device: str) -> None:
    step = make_step(case, device)
    angles = random_angles(len(case.rows), case.head_dim, device)
    query, key = (apply_rope_reference(heads, *angles) for heads in (step.query, step.key))
    cache, expected_cache = step.cloned_cache(), step.cloned_cache()
    expected = ReferenceAttention().forward(step.spec, query, key, step.value, expected_cache, step.metadata)
    output = torch.full_like(expected, torch.nan)
    decode_attention(
        step.spec, step.query, step.key, step.value, cache, step.metadata, Result(output), num_splits=num_splits,
        tiles=DecodeTiles(32, 2, 3, 2), turning=Turning(*angles),
    )  # fmt: skip
    tolerance = tolerance_of(case, device)
    assert_close(output, expected, tolerance)
    backend = TritonAttention()
    assert backend.turns_heads(step.metadata)
    again = backend.forward(
        step.spec, step.query, step.key, step.value, step.cloned_cache(), step.metadata, turning=angles
    )
    assert_close(again, expected, tolerance)
    if case.cache_dtype is None and device == "cuda":
        for part, expected_part in zip(cache, expected_cache, strict=True):
            torch.testing.assert_close(part.float(), expected_part.float(), rtol=2**-7, atol=1e-5, equal_nan=True)


TURNED_PROMPTS = [
    Case(MIXED),
    Case(MIXED, num_heads=3, num_kv_heads=1, head_dim=48, window=20),
    Case(((2, 0), (19, 0), (7, 21)), dtype=torch.bfloat16, num_heads=8, num_kv_heads=1, head_dim=128),
    Case(MIXED, dtype=torch.bfloat16, cache_dtype=FP8, key_scale=0.5),
    pytest.param(REAL, marks=pytest.mark.gpu),
    pytest.param(replace(REAL, cache_dtype=FP8), marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("case", TURNED_PROMPTS, ids=str)
def test_prompts_are_turned_on_the_way(case: Case, device: str) -> None:
    step = make_step(case, device)
    angles = random_angles(step.query.shape[0], case.head_dim, device)
    query, key = (apply_rope_reference(heads, *angles) for heads in (step.query, step.key))
    cache, expected_cache = step.cloned_cache(), step.cloned_cache()
    expected = ReferenceAttention().forward(step.spec, query, key, step.value, expected_cache, step.metadata)
    backend = TritonAttention()
    assert backend.turns_heads(step.metadata)
    actual = backend.forward(step.spec, step.query, step.key, step.value, cache, step.metadata, turning=angles)
    expected = in_float8(step, query, expected_cache, expected)
    tolerance = tolerance_of(case, device)
    assert_close(actual, expected, tolerance)
    if case.cache_dtype is None and (device == "cuda" or case.dtype == torch.float32):
        for part, expected_part in zip(cache, expected_cache, strict=True):
            torch.testing.assert_close(part.float(), expected_part.float(), rtol=2**-7, atol=1e-5, equal_nan=True)


def test_invariant_rows_are_turned_before(device: str) -> None:
    assert not TritonAttention(batch_invariant=True).turns_heads(make_step(Case(((1, 3),)), device).metadata)


@pytest.mark.parametrize("cache_dtype", [None, FP8], ids=str)
def test_turned_rows_told_apart_on_the_device(cache_dtype: torch.dtype | None, device: str) -> None:
    """As rows that the host tells apart; decode rows that pad write the keys of prompts once more."""
    case = Case(((1, 20), (1, 5), (7, 40), (18, 0), (33, 0)), cache_dtype=cache_dtype)
    step = make_step(case, device)
    inputs = inputs_of_prompts(*device_rows(case, step, 3), max_kv_len=512, num_prompts=4)
    num_tokens, padded_tokens = step.query.shape[0], inputs.attention.slot_mapping.shape[0]
    padding = padded_tokens - num_tokens
    padded = [torch.cat([part, part[:1].expand(padding, -1, -1)]) for part in (step.query, step.key, step.value)]
    cos, sin = random_angles(padded_tokens, case.head_dim, device)
    backend, caches = TritonAttention(), (step.cloned_cache(), step.cloned_cache())
    angles = cos[:num_tokens], sin[:num_tokens]
    whole = backend.forward(
        step.spec, step.query, step.key, step.value, caches[0], step.metadata, turning=angles
    )  # fmt: skip
    told_apart = backend.forward(step.spec, *padded, caches[1], inputs.attention, turning=(cos, sin))
    assert_close(told_apart[:num_tokens], whole, TOLERANCES[case.dtype])
    first, second = (tuple(part[1:] for part in cache) for cache in caches)  # padding is written to scratch block 0
    if device == "cpu":
        assert_same_cache(second, first)
    for one, other in zip(first, second, strict=True):  # compiled, a last bit may differ between the two kernels
        same = (one.float() - other.float()).abs() <= 1e-5
        assert (same | (one.float().isnan() & other.float().isnan())).float().mean() > 0.998
