"""The engine on a GPU gives the tokens of the CPU, however its steps are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.row_forms import give_no_quantized_rows
from tests.support.ways import GREEDY, NO_REUSE, WAYS, prompts_of
from tokenmill import LLM, KvCacheConfig, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.spec("H3")]

PROMPTS = prompts_of(1, 2, 7, 31, 32, 33, 64, 100, 150, 200, 3, 17)
GPU_WAYS: dict[str, dict[str, Any]] = {
    "graphs and overlap": {},
    "eager": {"enable_cuda_graphs": False},
    "graphs, no overlap": {"disable_overlap_scheduler": True},
    "eager, no overlap": {"enable_cuda_graphs": False, "disable_overlap_scheduler": True},
    **WAYS,
}


def make_llm(model_dir: Path, **changes: Any) -> LLM:
    options: dict[str, Any] = {"dtype": "float32", "max_batch_size": 8, "max_seq_len": 512, "kv_cache_config": NO_REUSE}
    return LLM(model_dir, **{**options, **changes})


def tokens_of(llm: LLM, params: SamplingParams = GREEDY) -> list[list[int]]:
    outputs: Any = llm.generate(PROMPTS, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[list[int]]:
    with make_llm(model_dir, device="cpu") as llm:
        return tokens_of(llm)


@pytest.mark.parametrize("way", GPU_WAYS)
def test_greedy_tokens_are_those_of_the_cpu(model_dir: Path, expected: list[list[int]], way: str) -> None:
    with make_llm(model_dir, **GPU_WAYS[way]) as llm:
        assert llm.description.device.startswith("cuda")
        assert tokens_of(llm) == expected
        if way == "preempted":
            assert llm.stats().num_preemptions > 0
        assert tokens_of(llm) == expected  # a second time: on used slots, blocks and graphs
        llm.check_integrity()


def test_sampling_and_logprobs_beside_greedy_rows(model_dir: Path) -> None:
    params = [
        SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, seed=index, ignore_eos=True, logprobs=2)
        if index % 2
        else SamplingParams(max_tokens=12, ignore_eos=True)
        for index in range(len(PROMPTS))
    ]
    with make_llm(model_dir) as gpu, make_llm(model_dir, device="cpu") as cpu:
        on_gpu: Any = gpu.generate(PROMPTS, params, use_tqdm=False)
        on_cpu: Any = cpu.generate(PROMPTS, params, use_tqdm=False)
    for one, two in zip(on_gpu, on_cpu, strict=True):
        assert one.outputs[0].token_ids == two.outputs[0].token_ids
        assert len(one.outputs[0].logprobs) == len(two.outputs[0].logprobs)
        if two.outputs[0].cumulative_logprob is not None:
            assert one.outputs[0].cumulative_logprob == pytest.approx(two.outputs[0].cumulative_logprob, abs=1e-2)


def test_a_cache_beyond_memory_is_refused_and_memory_is_given_back(model_dir: Path) -> None:
    from tokenmill.errors import OutOfMemoryError

    with pytest.raises(OutOfMemoryError):
        make_llm(model_dir, kv_cache_config=KvCacheConfig(max_tokens=10**9))
    with make_llm(model_dir) as llm:
        assert len(tokens_of(llm)) == len(PROMPTS)


def test_rows_quantized_in_passing_or_by_themselves_give_the_same(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float8 weights and cache: norms and activations that quantize their result, or leave it to the next layer."""
    cache = KvCacheConfig(max_tokens=8192, enable_block_reuse=False, dtype="fp8")
    options: dict[str, Any] = {"dtype": "bfloat16", "quantization": "fp8", "kv_cache_config": cache}
    with make_llm(model_dir, **options) as llm:
        in_passing = tokens_of(llm)
        assert tokens_of(llm) == in_passing
    give_no_quantized_rows(monkeypatch)
    with make_llm(model_dir, **options) as llm:
        assert tokens_of(llm) == in_passing


def test_sampling_from_graphs_of_many_sizes_in_turn(model_dir: Path) -> None:
    """Batches that shrink from step to step capture one size after another, among steps that run."""
    params = [
        SamplingParams(max_tokens=4 + 3 * index, temperature=0.8, seed=index, ignore_eos=True) for index in range(12)
    ]
    with make_llm(model_dir, max_batch_size=12) as llm, make_llm(model_dir, enable_cuda_graphs=False) as eager:
        first: Any = llm.generate(PROMPTS, params, use_tqdm=False)
        second: Any = llm.generate(PROMPTS, params, use_tqdm=False)
        expected: Any = eager.generate(PROMPTS, params, use_tqdm=False)
    tokens = [[output.outputs[0].token_ids for output in outputs] for outputs in (first, second, expected)]
    assert tokens[0] == tokens[1] == tokens[2]
