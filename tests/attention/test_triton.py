"""The Triton backend against the definition in `reference.py`: any mix of rows, in the interpreter and on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.support.attention_steps import (
    FP8,
    MIXED,
    REAL,
    TOLERANCES,
    Case,
    Step,
    assert_close,
    assert_same_cache,
    device_rows,
    make_step,
)
from tokenmill.attention.base import AttentionSpec, LayerCache
from tokenmill.attention.reference import ReferenceAttention
from tokenmill.runtime.step_inputs import inputs_of_prompts

pytest.importorskip("triton")
from tests.support.float8_attention import in_float8
from tokenmill.attention.triton import TritonAttention, first_row_without_history
from tokenmill.attention.triton_common import Result
from tokenmill.attention.triton_decode import decode_attention
from tokenmill.attention.triton_decode_tiles import DecodeTiles, choose_num_splits, decode_tiles
from tokenmill.attention.triton_kv_write import write_kv_triton
from tokenmill.attention.triton_prefill import PrefillTiles, prefill_attention


def check(case: Case, device: str, seed: int = 0) -> None:
    step = make_step(case, device, seed)
    cache, expected_cache = step.cloned_cache(), step.cloned_cache()
    actual = TritonAttention().forward(step.spec, step.query, step.key, step.value, cache, step.metadata)
    assert actual.is_contiguous()
    expected = ReferenceAttention().forward(step.spec, step.query, step.key, step.value, expected_cache, step.metadata)
    assert_same_cache(cache, expected_cache)
    expected = in_float8(step, step.query, cache, expected)
    # float8 keys and values are multiplied in float16
    tolerance = max(TOLERANCES[case.dtype], TOLERANCES[torch.float16] if case.cache_dtype == FP8 else 0.0)
    assert_close(actual, expected, tolerance)


CASES = [
    Case(MIXED),
    Case(MIXED, num_heads=2, num_kv_heads=2),
    Case(MIXED, num_heads=3, num_kv_heads=1),
    Case(MIXED, num_heads=8, num_kv_heads=1, head_dim=128, tokens_per_block=32),
    Case(MIXED, num_heads=7, num_kv_heads=1, head_dim=80),
    Case(MIXED, dtype=torch.bfloat16),
    Case(MIXED, dtype=torch.float16, tokens_per_block=64),
    Case(MIXED, window=8),
    Case(MIXED, window=1),
    Case(MIXED, window=20, soft_cap=3.0, dtype=torch.bfloat16),
    Case(MIXED, soft_cap=2.0),
    Case(((1, 80), (1, 3), (5, 90)), window=40, tokens_per_block=128),
    Case(((90, 70), (1 + 69, 0)), head_dim=16, num_heads=2, num_kv_heads=1),
    Case(MIXED, dtype=torch.bfloat16, cache_dtype=FP8),
    Case(MIXED, cache_dtype=FP8, key_scale=0.5, value_scale=0.0625, tokens_per_block=32),
    Case(MIXED, cache_dtype=torch.bfloat16),
]

GPU_CASES = [
    REAL,
    replace(REAL, dtype=torch.float16, tokens_per_block=16),
    replace(REAL, cache_dtype=FP8, tokens_per_block=64),
    replace(REAL, num_heads=9, num_kv_heads=3, head_dim=64),
    replace(REAL, num_heads=16, num_kv_heads=16, head_dim=64, tokens_per_block=128),
    replace(REAL, num_heads=64, head_dim=64, window=128),
    replace(REAL, num_heads=4, num_kv_heads=1, head_dim=256, window=512),
    replace(REAL, num_heads=8, num_kv_heads=4, head_dim=256, soft_cap=5.0),
    replace(REAL, num_heads=8, num_kv_heads=2, head_dim=256, cache_dtype=FP8),
    replace(REAL, num_heads=4, num_kv_heads=2, dtype=torch.float32),
]


@pytest.mark.spec("E1")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.spec("E1")
@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_equals_the_reference_at_real_sizes(case: Case) -> None:
    check(case, "cuda")


def run(step: Step, cache: LayerCache, **options: bool) -> torch.Tensor:
    return TritonAttention(**options).forward(step.spec, step.query, step.key, step.value, cache, step.metadata)


def test_a_window_reads_no_block_that_it_has_left(device: str) -> None:
    """The runner frees blocks behind the window: whatever lies there and whatever the table says, nothing changes."""
    step = make_step(Case(((1, 99), (9, 100)), window=16, tokens_per_block=16), device)
    expected = run(step, step.cloned_cache())
    tables = step.metadata.block_tables.clone()
    tables[:, :5] = 1 << 28  # reading there would be far outside the cache
    changed = replace(step, metadata=replace(step.metadata, block_tables=tables))
    assert torch.equal(run(changed, step.cloned_cache()), expected)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7])
@pytest.mark.parametrize("window", [None, 50])
def test_any_number_of_splits(num_splits: int, window: int | None, device: str) -> None:
    step = make_step(Case(((1, 130), (1, 0), (1, 1), (1, 64)), window=window), device)
    expected = ReferenceAttention().forward(
        step.spec, step.query, step.key, step.value, step.cloned_cache(), step.metadata
    )
    output = torch.full_like(step.query, torch.nan, memory_format=torch.contiguous_format)
    decode_attention(
        step.spec, step.query, step.key, step.value, step.cloned_cache(), step.metadata, Result(output),
        num_splits=num_splits, tiles=DecodeTiles(16, 4, 2, 4),
    )  # fmt: skip
    assert_close(output, expected, TOLERANCES[torch.float32])


def reference_with_sinks(step: Step, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and log-sum-exp by the book, row by row in float64."""
    keys, values = step.cloned_cache()
    slots = step.metadata.slot_mapping
    keys.flatten(0, 1)[slots], values.flatten(0, 1)[slots] = step.key, step.value
    outputs, sums, start = [], [], 0
    for row, (query_len, kv_len) in enumerate(zip(step.metadata.query_lens, step.metadata.kv_lens_host, strict=True)):
        table = step.metadata.block_tables[row].long()
        row_keys = keys[table].flatten(0, 1)[:kv_len].double().repeat_interleave(2, 1)
        row_values = values[table].flatten(0, 1)[:kv_len].double().repeat_interleave(2, 1)
        scores = (
            torch.einsum("qhd,khd->qhk", step.query[start : start + query_len].double(), row_keys) * step.spec.scale
        )
        positions = torch.arange(kv_len, device=scores.device)
        hidden = positions[None, None, :] > positions[kv_len - query_len :, None, None]
        scores = scores.masked_fill(hidden, -torch.inf)
        sums.append(scores.logsumexp(-1))
        with_sink = torch.cat([scores, sinks.double()[None, :, None].expand(query_len, -1, 1)], -1).softmax(-1)
        outputs.append(torch.einsum("qhk,khd->qhd", with_sink[..., :-1], row_values))
        start += query_len
    return torch.cat(outputs).float(), torch.cat(sums).float()


@pytest.mark.spec("E1")
@pytest.mark.parametrize("num_splits", [1, 3])
def test_sinks_and_log_sum_exp(num_splits: int, device: str) -> None:
    step = make_step(Case(((1, 70), (1, 2), (5, 9), (18, 0))), device)
    sinks = torch.linspace(-2.0, 3.0, 4, device=device)
    expected, expected_sums = reference_with_sinks(step, sinks)
    metadata, cache = step.metadata, step.cloned_cache()
    output, sums = torch.full_like(expected, torch.nan), torch.full_like(expected_sums, torch.nan)
    decode_attention(
        step.spec, step.query[:2], step.key[:2], step.value[:2], cache, metadata, Result(output[:2], sums[:2], sinks),
        num_splits=num_splits, tiles=DecodeTiles(16, 4, 2, 4),
    )  # fmt: skip
    prefill_attention(
        step.spec, step.query, step.key, step.value, cache, metadata, Result(output, sums, sinks),
        rows=slice(2, None), has_history=True, tiles=PrefillTiles(16, 16, 4, 2),
    )  # fmt: skip
    assert_close(output, expected, TOLERANCES[torch.float32])
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-5)
    through_backend = TritonAttention().forward(
        step.spec, step.query, step.key, step.value, step.cloned_cache(), metadata, sinks=sinks
    )
    assert_close(through_backend, expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize(
    ("lens", "first"),
    [
        (((1, 4), (1, 9)), 2),  # decode rows alone
        (((1, 4), (5, 0), (18, 0)), 1),
        (((1, 4), (5, 9), (18, 0), (2, 0)), 2),
        (((5, 0), (18, 3)), 2),  # one without history before one with it: all count as having it
    ],
)
def test_rows_without_history_at_the_end_are_attended_to_apart(
    lens: tuple[tuple[int, int], ...], first: int, device: str
) -> None:
    case = Case(lens)
    assert first_row_without_history(make_step(case, device).metadata) == first
    check(case, device)


def test_batch_invariant_rows_have_the_same_bits_alone_and_in_company(device: str) -> None:
    lens = (700, 3, 512, 1300) if device == "cuda" else (40, 3, 600)
    case = Case(tuple((1, length) for length in lens), num_heads=2, num_kv_heads=1, head_dim=16)
    step = make_step(case, device)
    together = run(step, step.cloned_cache(), batch_invariant=True)
    for row, length in enumerate(lens):
        one = slice(row, row + 1)
        metadata = replace(
            step.metadata,
            kv_lens=step.metadata.kv_lens[one],
            block_tables=step.metadata.block_tables[one],
            slot_mapping=step.metadata.slot_mapping[one],
            query_start=step.metadata.query_start[:2],
            num_decode_rows=1,
            query_lens=(1,),
            kv_lens_host=(length + 1,),
        )
        alone = replace(step, metadata=metadata, query=step.query[one], key=step.key[one], value=step.value[one])
        assert torch.equal(run(alone, step.cloned_cache(), batch_invariant=True)[0], together[row])


def test_padding_rows_are_harmless(device: str) -> None:
    """A graph's unused rows: length 0, slots in scratch block 0, a table of zeros; block 0 may hold NaN."""
    case = Case(((1, 20), (1, 5)))
    step = make_step(case, device)
    expected = run(step, step.cloned_cache())
    zeros = torch.zeros(1, dtype=torch.int32, device=device)
    metadata = replace(
        step.metadata,
        kv_lens=torch.cat([step.metadata.kv_lens, zeros]),
        block_tables=torch.nn.functional.pad(step.metadata.block_tables, (0, 0, 0, 1)),
        slot_mapping=torch.cat([step.metadata.slot_mapping, zeros.long()]),
        num_decode_rows=3,
        query_lens=(1, 1, 1),
        kv_lens_host=(),
        max_kv_len=64,
    )
    again = [torch.cat([part, torch.ones_like(part[:1])]) for part in (step.query, step.key, step.value)]
    padded = TritonAttention().forward(step.spec, *again, step.cloned_cache(), metadata)
    assert_close(padded[:2], expected, TOLERANCES[torch.float32])
    assert padded[2].isfinite().all()


PARTS = [
    Case(((1, 20), (1, 5), (7, 40), (18, 0), (33, 0))),
    Case(((1, 20), (7, 40), (3, 17)), cache_dtype=FP8, key_scale=0.5, value_scale=0.25),
    Case(((37, 0), (18, 0)), dtype=torch.bfloat16, num_heads=8),
    Case(((1, 9), (1, 300), (20, 250)), window=24, soft_cap=5.0, head_dim=80),
    Case(((40, 11),), tokens_per_block=32, cache_dtype=FP8, num_heads=8, head_dim=128),
]


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("case", PARTS, ids=str)
def test_rows_told_apart_on_the_device(case: Case, batch_invariant: bool, device: str) -> None:
    """Each part has room for more rows than it has, the step for more tokens; what pads them changes nothing."""
    step = make_step(case, device)
    cache, expected_cache = step.cloned_cache(), step.cloned_cache()
    expected = ReferenceAttention().forward(step.spec, step.query, step.key, step.value, expected_cache, step.metadata)
    num_tokens, count = step.query.shape[0], len(case.rows)
    inputs = inputs_of_prompts(*device_rows(case, step, 3), max_kv_len=512, num_prompts=4)
    assert inputs.attention.slot_mapping[:num_tokens].equal(step.metadata.slot_mapping)
    padding = inputs.attention.slot_mapping.shape[0] - num_tokens
    assert padding and inputs.slots.shape[0] > count
    padded = [torch.cat([part, part[:1].expand(padding, -1, -1)]) for part in (step.query, step.key, step.value)]
    backend = TritonAttention(batch_invariant=batch_invariant)
    output = backend.forward(step.spec, *padded, cache, inputs.attention)
    tolerance = max(TOLERANCES[case.dtype], TOLERANCES[torch.float16] if case.cache_dtype == FP8 else 0.0)
    assert_close(output[:num_tokens], expected, tolerance)
    for part, expected_part in zip(cache, expected_cache, strict=True):  # padding is written to scratch block 0
        torch.testing.assert_close(part[1:].float(), expected_part[1:].float(), rtol=0, atol=0, equal_nan=True)


def test_float8_saturates_and_keeps_nan(device: str) -> None:
    last = math.nan if device == "cuda" else 2.0  # the interpreter makes no NaN of type float8
    key = torch.tensor([1e6, -1e6, last, 1.0], device=device).repeat(4).view(1, 1, 16)
    cache = (torch.zeros(1, 16, 1, 16, device=device).to(FP8), torch.zeros(1, 16, 1, 16, device=device).to(FP8))
    spec = AttentionSpec(1, 1, 16, 1.0, key_scale=2.0)
    slots = torch.tensor([3], device=device)
    copies = write_kv_triton(spec, key, key, cache, slots)
    for part, scale, copy in zip(cache, (2.0, 1.0), copies, strict=True):
        expected = torch.tensor([448.0, -448.0, last / scale, 1.0 / scale], device=device).repeat(4)
        torch.testing.assert_close(part[0, 3, 0].float(), expected, equal_nan=True)
        assert part[0, 4:].float().count_nonzero() == 0
        torch.testing.assert_close(copy[0, 0].float(), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("programs", "max_kv_len", "expected"),
    [
        (8, 2048, 32),
        (136, 2048, 4),
        (352, 2048, 2),
        (8, 100, 2),
        (8, 1, 1),
        (64, 8192, 8),
        (512, 8192, 1),
        (10**6, 8192, 1),
        (1, 10**6, 64),
    ],
)
def test_number_of_splits(programs: int, max_kv_len: int, expected: int) -> None:
    assert choose_num_splits(programs, max_kv_len, 132, DecodeTiles(64, 4, 3, 4)) == expected


@pytest.mark.parametrize(
    ("num_rows", "max_kv_len", "num_splits"),
    [
        (1, 2048, 33),
        (17, 1024, 2),  # too short to be worth more parts
        (17, 4096, 4),
    ],
)
def test_few_rows_of_a_float8_cache_are_cut_into_parts(num_rows: int, max_kv_len: int, num_splits: int) -> None:
    tiles = decode_tiles(128, 1, num_rows, 8, 32, max_kv_len, 132)
    assert tiles.kv_heads is None
    assert choose_num_splits(num_rows * 8, max_kv_len, 132, tiles) == num_splits


@pytest.mark.gpu
def test_a_captured_decode_step_replays_with_other_lengths() -> None:
    """The graph holds shapes and the bound; lengths, blocks, slots and inputs are read anew."""
    options = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "tokens_per_block": 32, "dtype": torch.bfloat16}
    static = make_step(Case(((1, 4000), (1, 200), (1, 0)), **options), "cuda", seed=1)
    metadata = replace(static.metadata, kv_lens_host=(), max_kv_len=4096)
    static_cache = static.cloned_cache()
    inputs = [part.clone() for part in (static.query, static.key, static.value)]
    backend = TritonAttention()

    def forward() -> torch.Tensor:
        return backend.forward(static.spec, *inputs, static_cache, metadata)

    forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward()
    for seed, lens in enumerate([(10, 3000, 500), (0, 0, 4000), (2222, 1, 31)]):
        step = make_step(Case(tuple((1, length) for length in lens), **options), "cuda", seed=seed)
        for target, source in zip(
            (*inputs, *static_cache), (step.query, step.key, step.value, *step.cache), strict=True
        ):
            if target.shape == source.shape:
                target.copy_(source)
            else:  # another number of blocks
                target[: len(source)].copy_(source)
        metadata.kv_lens.copy_(step.metadata.kv_lens)
        metadata.slot_mapping.copy_(step.metadata.slot_mapping)
        metadata.block_tables.zero_()
        metadata.block_tables[:, : step.metadata.block_tables.shape[1]].copy_(step.metadata.block_tables)
        graph.replay()
        expected = ReferenceAttention().forward(
            step.spec, step.query, step.key, step.value, step.cloned_cache(), step.metadata
        )
        assert_close(output, expected, TOLERANCES[torch.bfloat16])
