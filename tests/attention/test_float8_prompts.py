"""Prompts over a float8 cache, multiplied in float8, against torch with the same rounding and against float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.attention_steps import FP8, REAL, TOLERANCES, Case, Step, assert_close, device_rows, make_step
from tokenmill.ops.rope import apply_rope_reference
from tokenmill.runtime.step_inputs import inputs_of_prompts

pytest.importorskip("triton")
from tests.support.float8_attention import attend_in_float8, in_float8, rounded_queries
from tokenmill.attention.base import LayerCache
from tokenmill.attention.reference import ReferenceAttention
from tokenmill.attention.triton import TritonAttention, multiplies_float8
from tokenmill.attention.triton_common import Result
from tokenmill.attention.triton_kv_write import write_float8_kv, write_kv_triton

LLAMA = Case(((1, 20), (7, 21), (33, 5), (19, 0), (30, 0)), 8, 2, 128, dtype=torch.float16, cache_dtype=FP8)


def run(step: Step, **options: bool) -> tuple[torch.Tensor, LayerCache]:
    cache = step.cloned_cache()
    output = TritonAttention(**options).forward(step.spec, step.query, step.key, step.value, cache, step.metadata)
    return output, cache


def in_exact_products(step: Step) -> torch.Tensor:
    """Float32 products with the cached keys and values."""
    inputs = (step.query.float(), step.key.float(), step.value.float())
    return ReferenceAttention().forward(step.spec, *inputs, step.cloned_cache(), step.metadata)


GPU = replace(REAL, cache_dtype=FP8)
CASES = [
    LLAMA,
    replace(LLAMA, num_heads=2, key_scale=0.5, value_scale=0.0625),
    replace(LLAMA, num_heads=16, num_kv_heads=1, tokens_per_block=64, dtype=torch.bfloat16),
    pytest.param(replace(GPU, rows=((1, 40), (300, 1), (1000, 0), (37, 0), (64, 0))), marks=pytest.mark.gpu),
    pytest.param(replace(GPU, rows=((900, 0), (3, 0)), num_heads=8, key_scale=2.0), marks=pytest.mark.gpu),
    pytest.param(replace(GPU, rows=((2500, 0),), num_heads=16), marks=pytest.mark.gpu),
]


@pytest.mark.spec("E1")
@pytest.mark.spec("E4")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rounds_queries_and_probabilities_alone(case: Case, device: str) -> None:
    step = make_step(case, device)
    assert multiplies_float8(step.spec, step.query, step.cache, Result(step.query))
    output, cache = run(step)
    prompts = slice(step.metadata.num_decode_rows, None)
    rounded = attend_in_float8(replace(step, cache=cache), step.query)
    # On a GPU a score's last digit decides between two float8 probabilities, and float8 products have shorter sums.
    tolerance = TOLERANCES[torch.bfloat16] if device == "cuda" else TOLERANCES[case.dtype]
    assert_close(output[prompts], rounded.to(case.dtype), tolerance)
    exact = in_exact_products(step)
    error = (output.float() - exact)[prompts].norm() / exact[prompts].norm()
    assert 0.004 < error < 0.04  # three digits behind the first: half of 1/16 at most, 1/55 in the mean


def test_a_prompt_in_pieces_sees_the_same_keys(device: str) -> None:
    """What a chunk reads from the cache is what the whole prompt multiplied."""
    num_tokens = 200 if device == "cuda" else 40
    whole = make_step(replace(LLAMA, rows=((num_tokens, 0),)), device)
    expected, cache = run(whole)
    half = num_tokens // 2
    metadata = whole.metadata
    pieces = []
    for start in (0, half):
        tokens = slice(start, start + half)
        piece = replace(
            metadata,
            query_start=torch.tensor([0, half], dtype=torch.int32, device=device),
            kv_lens=metadata.kv_lens - num_tokens + start + half,
            slot_mapping=metadata.slot_mapping[tokens],
            query_lens=(half,),
            kv_lens_host=(start + half,),
        )
        rows = (whole.query[tokens], whole.key[tokens], whole.value[tokens])
        pieces.append(TritonAttention().forward(whole.spec, *rows, cache, piece))
    exact = in_exact_products(replace(whole, query=rounded_queries(whole.query)))
    for output in (expected, torch.cat(pieces)):  # probabilities are rounded in one of them
        assert_close(output.float(), exact, 0.03 if device == "cuda" else 2e-3)


def test_rows_told_apart_on_the_device(device: str) -> None:
    """As a graph has them: decode rows, one with history, two without, and rows that pad; turned on the way."""
    case = replace(LLAMA, rows=((1, 20), (1, 5), (7, 40), (18, 0), (33, 0)))
    step = make_step(case, device)
    num_tokens = step.query.shape[0]
    inputs = inputs_of_prompts(*device_rows(case, step, 3), max_kv_len=512, num_prompts=4)
    padding = inputs.attention.slot_mapping.shape[0] - num_tokens
    padded = [torch.cat([part, part[:1].expand(padding, -1, -1)]) for part in (step.query, step.key, step.value)]
    angles = (
        torch.linspace(0.0, 9.0, num_tokens + padding, device=device)[:, None, None].expand(-1, 1, 128).contiguous()
    )
    cos, sin = angles.cos(), torch.cat((-angles[..., :64].sin(), angles[..., :64].sin()), -1)
    cache, own = step.cloned_cache(), (cos[:num_tokens], sin[:num_tokens])
    query, key = (apply_rope_reference(part, *own) for part in (step.query, step.key))
    actual = TritonAttention().forward(step.spec, *padded, cache, inputs.attention, turning=(cos, sin))[:num_tokens]
    exact = ReferenceAttention().forward(step.spec, query, key, step.value, step.cloned_cache(), step.metadata)
    # A last digit of a turned key decides between two of its numbers.
    tolerance = TOLERANCES[torch.bfloat16] if device == "cuda" else 3 * TOLERANCES[case.dtype]
    assert_close(actual, in_float8(step, query, cache, exact), tolerance)


def test_another_rows_nan_stays_there(device: str) -> None:
    """The tiles of keys and values of a row may begin and end with tokens of its neighbours."""
    rows = ((70, 0), (45, 0), (131, 0)) if device == "cuda" else ((9, 0), (13, 0), (21, 0))
    step = make_step(replace(LLAMA, rows=rows), device)
    expected, _ = run(step)
    first, last = rows[0][0], rows[0][0] + rows[1][0]
    others = [slice(0, first), slice(last, None)]
    value = step.value.clone()
    for tokens in others:
        value[tokens] = torch.nan
    output, _ = run(replace(step, value=value))
    assert torch.equal(output[first:last], expected[first:last])
    if device == "cuda":  # the interpreter makes no NaN of type float8
        assert all(output[tokens].isnan().any() for tokens in others)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"cache_dtype": None},
        {"head_dim": 64},
        {"window": 8},
        {"soft_cap": 5.0},
        {"num_heads": 6},
    ],
    ids=str,
)
def test_anything_else_multiplies_as_before(change: dict[str, object], device: str) -> None:
    step = make_step(replace(LLAMA, **change), device)  # type: ignore[arg-type]
    assert not multiplies_float8(step.spec, step.query, step.cache, Result(step.query))
    sinks = torch.zeros(8, device=device)
    llama = make_step(LLAMA, device)
    assert not multiplies_float8(llama.spec, llama.query, llama.cache, Result(llama.query, None, sinks))


def test_deterministic_mode_is_exact(device: str) -> None:
    step = make_step(LLAMA, device)
    output, _ = run(step, batch_invariant=True)
    assert_close(output, in_exact_products(step).to(output.dtype), TOLERANCES[torch.float16])


@pytest.mark.parametrize("num_tokens", [1, 16, 37])
def test_values_are_written_along_the_tokens(num_tokens: int, device: str) -> None:
    step = make_step(replace(LLAMA, rows=((num_tokens, 0), (3, 0)), key_scale=0.5), device)
    caches = step.cloned_cache(), step.cloned_cache()
    slots = step.metadata.slot_mapping
    expected = write_kv_triton(step.spec, step.key, step.value, caches[0], slots)
    copies = write_float8_kv(step.spec, step.key, step.value, caches[1], slots)
    assert copies[1].stride(0) == 1 and copies[0].stride(2) == 1
    for one, other in zip((*expected, *caches[0]), (*copies, *caches[1]), strict=True):
        torch.testing.assert_close(other.float(), one.float(), rtol=0.0, atol=0.0, equal_nan=True)
