"""The FlashInfer backend against the definition in `reference.py`: its arguments with a stand-in for the library on a
CPU, its numbers with the library on a GPU.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.attention.test_triton import (
    FP8,
    MIXED,
    REAL,
    TOLERANCES,
    Case,
    Step,
    assert_close,
    assert_same_cache,
    make_step,
)
from tests.support import fake_flashinfer
from tokenmill.attention.base import AttentionMetadata, AttentionSpec
from tokenmill.attention.flashinfer import FlashInferAttention, paged_rows
from tokenmill.attention.reference import ReferenceAttention
from tokenmill.attention.select import FLASHINFER_HEAD_DIMS, captures_graphs, check_backend, select_backend
from tokenmill.errors import InvalidParameterError, UnsupportedFeatureError

CASES = [
    Case(MIXED),
    Case(MIXED, num_heads=3, num_kv_heads=1),
    Case(MIXED, num_heads=2, num_kv_heads=2, tokens_per_block=32),
    Case(MIXED, window=8),
    Case(MIXED, window=1),
    Case(MIXED, window=20, soft_cap=3.0),
    Case(MIXED, cache_dtype=FP8, key_scale=0.5, value_scale=0.0625),
    Case(((1, 3), (1, 40))),
    Case(((2, 3), (40, 0))),
]

GPU_CASES = [
    REAL,
    replace(REAL, cache_dtype=FP8, tokens_per_block=64),
    replace(REAL, cache_dtype=FP8, key_scale=0.5, value_scale=0.0625),
    replace(REAL, window=700, soft_cap=5.0),
    replace(REAL, dtype=torch.float16, num_heads=9, num_kv_heads=3, head_dim=64, tokens_per_block=16),
    replace(REAL, num_heads=16, num_kv_heads=16, tokens_per_block=128),
    replace(REAL, rows=((1, 1099),) * 64),
    replace(REAL, rows=((2048, 0),) * 2),
    *(
        replace(REAL, dtype=dtype, head_dim=head_dim, cache_dtype=cache_dtype)
        for dtype in (torch.float16, torch.bfloat16)
        for head_dim in FLASHINFER_HEAD_DIMS
        for cache_dtype in (None, FP8)
        if (dtype, head_dim) != (REAL.dtype, REAL.head_dim)
    ),
]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_flashinfer.install(monkeypatch)
    monkeypatch.setattr("tokenmill.attention.flashinfer.WORKSPACE_BYTES", 16)


def run(backend: FlashInferAttention, step: Step, spec: AttentionSpec | None = None) -> torch.Tensor:
    return backend.forward(spec or step.spec, step.query, step.key, step.value, step.cloned_cache(), step.metadata)


def expected_of(step: Step, spec: AttentionSpec | None = None) -> torch.Tensor:
    cache = step.cloned_cache()
    return ReferenceAttention().forward(spec or step.spec, step.query, step.key, step.value, cache, step.metadata)


def check(case: Case, device: str) -> None:
    step = make_step(case, device)
    cache, expected_cache = step.cloned_cache(), step.cloned_cache()
    actual = FlashInferAttention().forward(step.spec, step.query, step.key, step.value, cache, step.metadata)
    expected = ReferenceAttention().forward(step.spec, step.query, step.key, step.value, expected_cache, step.metadata)
    assert_same_cache(cache, expected_cache)
    assert_close(actual, expected, TOLERANCES[case.dtype])


@pytest.mark.spec("E1")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case, fake: None) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled for the GPU in this process")
    check(case, "cpu")


@pytest.mark.spec("E1")
@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_equals_the_reference_at_real_sizes(case: Case) -> None:
    pytest.importorskip("flashinfer")
    check(case, "cuda")


def interpreted(rows: Any, **changes: Any) -> Step:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled for the GPU in this process")
    return make_step(Case(rows, **changes), "cpu")


def test_a_step_is_planned_once_for_layers_of_a_kind(fake: None) -> None:
    """Layers with and without a window in turn, then with other scales of the cache, then the next step."""
    steps = [interpreted(((1, 9), (1, 30), (6, 20))), interpreted(((1, 10), (1, 31), (7, 20)))]
    backend = FlashInferAttention()
    specs = [steps[0].spec, replace(steps[0].spec, sliding_window=5), replace(steps[0].spec, key_scale=2.0)]
    for step in steps:
        for spec in (*specs, *specs):
            assert_close(run(backend, step, spec), expected_of(step, spec), TOLERANCES[torch.float32])
    kinds = list(backend._wrappers.values())
    assert [(kind.decode.num_plans, kind.prompts.num_plans) for kind in kinds] == [(2, 2), (2, 2)]
    assert kinds[0].decode.workspace is kinds[1].prompts.workspace


def test_steps_in_turn_get_their_own_plans(fake: None) -> None:
    """First runs of several steps go on at the same time, layer by layer."""
    steps = [interpreted(((1, 9), (6, 20))), interpreted(((1, 40),)), interpreted(((30, 0),))]
    backend = FlashInferAttention()
    for _ in range(2):
        for step in steps:
            assert_close(run(backend, step), expected_of(step), TOLERANCES[torch.float32])


def test_lists_of_blocks() -> None:
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, 1, 2, 5], dtype=torch.int32),
        kv_lens=torch.tensor([17, 16, 3], dtype=torch.int32),
        block_tables=torch.tensor([[4, 9, 0], [7, 0, 0], [5, 0, 0]], dtype=torch.int32),
        slot_mapping=torch.zeros(5, dtype=torch.int64),
        num_decode_rows=2,
        query_lens=(1, 1, 3),
        kv_lens_host=(17, 16, 3),
    )
    decode, prompts = paged_rows(metadata, slice(0, 2), 16), paged_rows(metadata, slice(2, 3), 16)
    assert [part.tolist() for part in decode] == [[0, 1, 2], [0, 2, 3], [4, 9, 7], [1, 16]]
    assert [part.tolist() for part in prompts] == [[0, 3], [0, 1], [5], [3]]


@pytest.mark.parametrize("kind", ["BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"])
@pytest.mark.parametrize("method", ["__init__", "plan", "run"])
def test_the_library_has_these_parameters(kind: str, method: str) -> None:
    library = pytest.importorskip("flashinfer")
    real, ours = (
        list(inspect.signature(getattr(getattr(module, kind), method)).parameters)
        for module in (library, fake_flashinfer)
    )
    assert set(ours) <= set(real)
    num_positional = {"__init__": 3, "plan": 9 if "Prefill" in kind else 8, "run": 3}[method]
    assert ours[:num_positional] == real[:num_positional]


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(UnsupportedFeatureError, match=r"tokenmill\[flashinfer\]") as caught:
        select_backend("flashinfer", torch.device("cuda"))
    assert caught.value.field == "attn_backend"


def test_chosen_by_name_alone(fake: None) -> None:
    assert select_backend("flashinfer", torch.device("cuda")).name == "flashinfer"
    assert select_backend("auto", torch.device("cuda")).name == "triton"


@pytest.mark.parametrize(
    ("select", "error_class", "field"),
    [
        (lambda: select_backend("flashinfer", torch.device("cpu")), InvalidParameterError, "attn_backend"),
        (
            lambda: select_backend("flashinfer", torch.device("cuda"), batch_invariant=True),
            UnsupportedFeatureError,
            "deterministic",
        ),
    ],
)
def test_unfit_places(fake: None, select: Callable[[], object], error_class: type[Exception], field: str) -> None:
    with pytest.raises(error_class) as caught:
        select()
    assert getattr(caught.value, "field", None) == field


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"head_dim": 80}, "attn_backend", "64, 128, 256 columns, not of 80"),
        ({"dtype": torch.float32, "cache_dtype": torch.float32}, "dtype", "float32"),
        ({"cache_dtype": torch.float16}, "kv_cache_config.dtype", "float16"),
    ],
)
def test_unfit_models(changes: dict[str, Any], field: str, words: str) -> None:
    fit: dict[str, Any] = {"head_dim": 128, "dtype": torch.bfloat16, "cache_dtype": torch.bfloat16}
    check_backend("flashinfer", **fit)
    check_backend("flashinfer", **(fit | {"cache_dtype": FP8}))
    check_backend("triton", **(fit | changes))
    with pytest.raises(UnsupportedFeatureError, match=words) as caught:
        check_backend("flashinfer", **(fit | changes))
    assert caught.value.field == field


def test_only_triton_runs_in_graphs(caplog: pytest.LogCaptureFixture) -> None:
    names = ("triton", "reference", "cpu", "flashinfer")
    assert [captures_graphs(name, wanted=False) for name in names] == [False] * 4
    assert [captures_graphs(name, wanted=True) for name in names[:3]] == [True, False, False]
    assert not caplog.records
    assert not captures_graphs("flashinfer", wanted=True)
    assert "without CUDA graphs" in caplog.text
