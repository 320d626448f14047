"""What decode attention of many rows does beside attention, against the kernels that do it alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.attention_steps import FP8, Case, Step, assert_close, make_step
from tokenmill.attention.base import LayerCache
from tokenmill.layers.attention import Attention
from tokenmill.layers.context import LayerContext
from tokenmill.layers.norm import RMSNorm
from tokenmill.layers.rope import Rotation
from tokenmill.ops.fp8 import QuantizedRows
from tokenmill.ops.head_norm import HeadNorm
from tokenmill.quantization.base import RowForm

pytest.importorskip("triton")
from tokenmill.attention.triton import TritonAttention
from tokenmill.attention.triton_common import HeadNorms, Result, Turning
from tokenmill.attention.triton_decode_heads import decode_attention_of_heads
from tokenmill.attention.triton_decode_rows import QuantizedResult
from tokenmill.attention.triton_decode_tiles import DecodeTiles
from tokenmill.ops.triton.fp8 import new_quantized, per_token_quantize_fp8
from tokenmill.ops.triton.head_norm import norm_and_rope

ROWS = ((1, 20), (1, 0), (1, 64), (1, 77))
SMALL = Case(ROWS, num_heads=8, num_kv_heads=4, head_dim=32, dtype=torch.bfloat16, tokens_per_block=32, cache_dtype=FP8)
REAL = Case(
    ((1, 1100), (1, 0), (1, 63), (1, 31)) * 10,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    tokens_per_block=32,
    dtype=torch.bfloat16,
    cache_dtype=FP8,
)
WHOLE_ROWS = [
    (SMALL, 4),
    (replace(SMALL, num_heads=12, num_kv_heads=4), 4),
    (replace(SMALL, num_heads=10, num_kv_heads=2), 2),
    (replace(SMALL, num_heads=3, num_kv_heads=1, dtype=torch.float32), 1),
    *(
        pytest.param(replace(REAL, num_heads=num_heads, num_kv_heads=kv_heads), kv_heads, marks=pytest.mark.gpu)
        for num_heads, kv_heads in ((32, 4), (28, 4), (16, 2))
    ),
]
CASES = [*WHOLE_ROWS, (SMALL, 2), pytest.param(REAL, 2, marks=pytest.mark.gpu)]


def with_a_padding_row(step: Step) -> Step:
    """The last row gets the length 0 and a slot in scratch block 0."""
    kv_lens, slots = step.metadata.kv_lens.clone(), step.metadata.slot_mapping.clone()
    kv_lens[-1], slots[-1] = 0, 0
    return replace(step, metadata=replace(step.metadata, kv_lens=kv_lens, slot_mapping=slots))


def new_result(step: Step) -> QuantizedResult:
    """Room for the rows of a step, full of what must not be left there."""
    num_rows, num_heads, head_dim = step.query.shape
    values, scales = new_quantized(num_rows, num_heads * head_dim, step.query.device)
    values.view(torch.uint8).fill_(0x7F)  # NaN
    return QuantizedResult(values, scales.fill_(torch.nan))


def attend(
    step: Step,
    cache: LayerCache,
    kv_heads: int,
    quantized: QuantizedResult | None = None,
    turning: Turning | None = None,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    output = torch.full_like(step.query, torch.nan, memory_format=torch.contiguous_format)
    decode_attention_of_heads(
        step.spec, step.query, step.key, step.value, cache, step.metadata, Result(output), turning=turning, norms=norms,
        tiles=DecodeTiles(32, kv_heads, 3, 1, kv_heads=kv_heads), quantized_result=quantized,
    )  # fmt: skip
    return output


def angles_and_norm(step: Step) -> tuple[Turning, HeadNorm]:
    generator = torch.Generator().manual_seed(5)
    num_rows, _, head_dim = step.query.shape
    turns = torch.randn(num_rows, 1, head_dim // 2, generator=generator).to(step.query.device)
    factors = (torch.rand(2, head_dim, generator=generator) + 0.5).to(step.query)
    turning = Turning(torch.cat([turns.cos()] * 2, -1), torch.cat([-turns.sin(), turns.sin()], -1))
    return turning, HeadNorm(factors[0], factors[1], 1e-6)


@pytest.mark.spec("E1")
@pytest.mark.parametrize(("case", "kv_heads"), WHOLE_ROWS, ids=str)
def test_quantized_results_have_the_bits_of_the_kernel_that_quantizes(case: Case, kv_heads: int, device: str) -> None:
    step = with_a_padding_row(make_step(case, device))
    values, scales = per_token_quantize_fp8(attend(step, step.cloned_cache(), kv_heads).flatten(1))
    result = new_result(step)
    attend(step, step.cloned_cache(), kv_heads, result)
    assert torch.equal(result.float8.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(result.scales, scales)


@pytest.mark.parametrize(("case", "kv_heads"), CASES, ids=str)
def test_heads_are_normalized_on_the_way(case: Case, kv_heads: int, device: str) -> None:
    step = with_a_padding_row(make_step(case, device))
    turning, norm = angles_and_norm(step)
    cache, expected_cache = step.cloned_cache(), step.cloned_cache()
    heads = norm_and_rope(
        torch.cat([step.query, step.key], 1), case.num_heads, norm.query, norm.key, norm.eps, *turning
    )  # fmt: skip
    before = replace(step, query=heads[:, : case.num_heads], key=heads[:, case.num_heads :])
    expected = attend(before, expected_cache, kv_heads)
    found = attend(step, cache, kv_heads, turning=turning, norms=HeadNorms(norm.query, norm.key, norm.eps))
    assert_close(found, expected, 4e-2 if case.dtype == torch.bfloat16 else 1e-3)
    for part, expected_part in zip(cache, expected_cache, strict=True):
        same = part.view(torch.uint8) == expected_part.view(torch.uint8)
        assert same.float().mean() > 0.998


class Launches:
    """A backend's launches around attention, which a layer must not make where attention does their work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fused = 0
        forward_fused = TritonAttention.forward_fused

        def counted(*args: Any, **options: Any) -> Any:
            self.fused += 1
            return forward_fused(*args, **options)

        monkeypatch.setattr(TritonAttention, "forward_fused", counted)
        monkeypatch.setattr("tokenmill.attention.triton.num_multiprocessors", lambda device: 1)


FUSED = replace(SMALL, num_heads=4, num_kv_heads=2, head_dim=128)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("form", [RowForm.PLAIN, RowForm.QUANTIZED])
def test_a_layer_gets_rows_as_from_separate_launches(
    has_norms: bool, form: RowForm, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches(monkeypatch)
    step = make_step(FUSED, device)
    context = LayerContext(dtype=torch.bfloat16, device=torch.device(device), backend=TritonAttention())
    layer = Attention(step.spec, context)
    turning, norm = angles_and_norm(step)
    norms = None
    if has_norms:
        norms = (RMSNorm(128, norm.eps, context), RMSNorm(128, norm.eps, context))
        norms[0].weight.data, norms[1].weight.data = norm.query, norm.key
    qkv = torch.cat([step.query, step.key, step.value], 1)
    arguments = qkv, Rotation(*turning), step.metadata
    cache, expected_cache = step.cloned_cache(), step.cloned_cache()
    rows = layer.prepare_and_attend(*arguments, cache, norms=norms, form=form)
    assert launches.fused == 1 and isinstance(rows, QuantizedRows) == (form is RowForm.QUANTIZED)
    if isinstance(rows, QuantizedRows):
        rows = (rows.values.float() * rows.scales[:, None]).bfloat16()
    layer._fusing_backend = None
    expected = layer.prepare_and_attend(*arguments, expected_cache, norms=norms, form=form)
    assert launches.fused == 1 and isinstance(expected, torch.Tensor)
    assert_close(rows, expected, 0.09 if form is RowForm.QUANTIZED else 0.03)  # the interpreter cuts float8 off
    for part, expected_part in zip(cache, expected_cache, strict=True):
        assert (part.view(torch.uint8) == expected_part.view(torch.uint8)).float().mean() > 0.998


def test_steps_in_which_nothing_is_fused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, few rows, heads that no program takes in pairs, and rows that are the same in any company."""
    Launches(monkeypatch)
    many, backend = make_step(FUSED, device), TritonAttention()
    assert backend.fuses(many.spec, many.cache, many.metadata)
    assert not TritonAttention(batch_invariant=True).fuses(many.spec, many.cache, many.metadata)
    for case in (
        replace(FUSED, rows=(*ROWS, (3, 9))),
        replace(FUSED, rows=((3, 9),)),
        replace(FUSED, rows=ROWS[:1]),
        replace(FUSED, num_kv_heads=1),
        replace(FUSED, head_dim=64),
        replace(FUSED, cache_dtype=torch.bfloat16),
    ):
        other = make_step(case, device)
        assert not backend.fuses(other.spec, other.cache, other.metadata)


@pytest.mark.gpu
@pytest.mark.parametrize("num_kv_heads", [4, 8])
def test_a_captured_step_is_replayed_twice(num_kv_heads: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other lengths and other numbers each time, as from separate launches."""
    assert device == "cuda"
    monkeypatch.setattr("tokenmill.attention.triton.num_multiprocessors", lambda device: 20)
    step = make_step(replace(REAL, num_kv_heads=num_kv_heads), device)
    turning, norm = angles_and_norm(step)
    qkv, backend = torch.cat([step.query, step.key, step.value], 1), TritonAttention()
    cache, factors = step.cloned_cache(), (norm.query, norm.key, norm.eps)
    assert backend.fuses(step.spec, cache, step.metadata)

    def run(quantizes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        rows = backend.forward_fused(step.spec, qkv, turning, factors, cache, step.metadata, quantizes=quantizes)
        return rows if isinstance(rows, tuple) else per_token_quantize_fp8(rows)

    run(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values, scales = run(True)
    for seed in (1, 2):
        qkv.copy_(torch.randn(qkv.shape, generator=torch.Generator().manual_seed(seed)))
        step.metadata.kv_lens.sub_(step.metadata.kv_lens // 7)
        graph.replay()
        expected_values, expected_scales = run(False)
        assert torch.equal(values.view(torch.uint8), expected_values.view(torch.uint8))
        assert torch.equal(scales, expected_scales)
