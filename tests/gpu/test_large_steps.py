"""Steps with long prompts give the same tokens from graphs and launched one by one, and graphs keep to their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_checkpoint import write_tiny_moe_model
from tests.support.ways import prompts_of
from tokenmill import LLM, KvCacheConfig, SamplingParams
from tokenmill.builder.build import build
from tokenmill.runtime.step_graphs import StepGraphs
from tokenmill.runtime.step_sizes import StepSize

pytestmark = [pytest.mark.gpu, pytest.mark.spec("C1", "H3")]

PROMPTS = prompts_of(600, 900, 1, 30, 513, 300, 1400, 64, 2, 700, 1023, 1024, 8, 250, 40, 768, 333, 90, 1201, 5)
PARAMS = [SamplingParams(max_tokens=4 + 5 * index % 23, ignore_eos=True) for index in range(len(PROMPTS))]
SIZES = {"max_batch_size": 80, "max_seq_len": 2048, "max_num_tokens": 3072}
CACHE: dict[str, Any] = {"max_tokens": 40_000, "tokens_per_block": 16}
WAYS: dict[str, dict[str, Any]] = {
    "few rows at a time": {"max_batch_size": 6},
    "chunks of whole steps": {"max_num_tokens": 1024},
    "prefix cache": {"kv_cache_config": KvCacheConfig(**CACHE)},
    "float8 cache": {"kv_cache_config": KvCacheConfig(**CACHE, enable_block_reuse=False, dtype="fp8")},
    "mixture": {"max_num_tokens": 2048},
}


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_moe_model(tmp_path_factory.mktemp("moe") / "tiny")


@pytest.fixture(scope="module")
def engine_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built for the sizes that `make_llm` serves with."""
    return build(model_dir, device="cuda", dtype="float32", **SIZES).save(tmp_path_factory.mktemp("built") / "engine")


@pytest.fixture(params=["model", "engine"])
def either_dir(request: pytest.FixtureRequest) -> Path:
    """A model's directory, then an engine's that was built of it."""
    folder: Path = request.getfixturevalue(f"{request.param}_dir")
    return folder


def make_llm(folder: Path, **changes: Any) -> LLM:
    options: dict[str, Any] = {
        "dtype": "float32", **SIZES, "kv_cache_config": KvCacheConfig(**CACHE, enable_block_reuse=False)
    }  # fmt: skip
    return LLM(folder, **{**options, **changes})


def tokens_of(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    outputs: Any = llm.generate(prompts, PARAMS[: len(prompts)], use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def graphs_of(llm: LLM) -> StepGraphs:
    graphs: StepGraphs = llm._executor._engine.runner._graphs  # type: ignore[attr-defined]
    return graphs


def large_sizes(llm: LLM) -> set[StepSize]:
    return {size for size in graphs_of(llm)._captured if size.num_prompts}


@pytest.mark.parametrize("way", WAYS)
def test_large_steps_from_graphs_give_the_tokens_of_eager_steps(model_dir: Path, moe_dir: Path, way: str) -> None:
    folder = moe_dir if way == "mixture" else model_dir
    with make_llm(folder, enable_cuda_graphs=False, **WAYS[way]) as eager:
        expected = tokens_of(eager)
        expected_again = tokens_of(eager, PROMPTS[::-1])
    with make_llm(folder, **WAYS[way]) as llm:
        assert len(large_sizes(llm)) == 1, "the largest is captured at start"
        assert tokens_of(llm) == expected
        assert tokens_of(llm, PROMPTS[::-1]) == expected_again
        assert tokens_of(llm) == expected
        if way != "prefix cache":  # which leaves large steps to the first round
            assert len(large_sizes(llm)) > 1
        llm.check_integrity()


def test_cancelled_rows_and_drawn_tokens_beside_prompts(model_dir: Path) -> None:
    """Rows leave while prompts come; steps that draw tokens have graphs without the choice."""
    drawn = SamplingParams(max_tokens=12, temperature=0.8, seed=3, ignore_eos=True)
    with make_llm(model_dir, enable_cuda_graphs=False) as eager:
        expected = tokens_of(eager)
        expected_drawn: Any = eager.generate(PROMPTS, drawn, use_tqdm=False)
    with make_llm(model_dir) as llm:
        for _ in range(3):
            leaving = [
                llm.generate_async(prompt, SamplingParams(max_tokens=200, ignore_eos=True)) for prompt in PROMPTS
            ]
            results = [llm.generate_async(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
            for result in leaving:
                result.abort()
            assert [result.result().outputs[0].token_ids for result in results] == expected
            outputs: Any = llm.generate(PROMPTS, drawn, use_tqdm=False)
            assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected_drawn]
        llm.check_integrity()


def test_a_built_engine_captures_the_steps_of_its_model(model_dir: Path, engine_dir: Path) -> None:
    with make_llm(model_dir) as direct:
        captured = set(graphs_of(direct)._captured)
        expected, expected_again = tokens_of(direct), tokens_of(direct, PROMPTS[::-1])
    with make_llm(engine_dir) as llm:
        assert llm.description.backend == "engine"
        assert set(graphs_of(llm)._captured) == captured
        assert max(size.num_tokens for size in captured) == SIZES["max_num_tokens"]
        assert tokens_of(llm) == expected
        assert tokens_of(llm, PROMPTS[::-1]) == expected_again
        assert tokens_of(llm) == expected
        assert len(large_sizes(llm)) > 1
        llm.check_integrity()


def test_a_built_engines_cache_of_nearly_all_memory_leaves_enough_for_steps(engine_dir: Path) -> None:
    """Of 3 GiB, whatever else lies on the device: no step, and no graph that is captured later, finds too little.

    The same of models that are served directly: tests/runtime/test_device_errors.py.
    """
    torch.cuda.empty_cache()
    others = torch.empty(torch.cuda.mem_get_info()[0] - (3 << 30), dtype=torch.uint8, device="cuda")
    cache = KvCacheConfig(free_gpu_memory_fraction=0.95, tokens_per_block=64, enable_block_reuse=False)
    drawn = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=3, ignore_eos=True)
    with make_llm(engine_dir, kv_cache_config=cache) as llm:
        memory = llm.description.memory
        assert memory.kv_cache > 0.8 * ((3 << 30) - memory.graphs - memory.activations)
        num_shortages = torch.cuda.memory_stats()["num_ooms"]
        for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS):
            assert all(len(tokens) > 0 for tokens in tokens_of(llm, prompts))
            outputs: Any = llm.generate(prompts, drawn, use_tqdm=False)
            assert all(output.outputs[0].finish_reason == "length" for output in outputs)
        assert len(large_sizes(llm)) > 1
        assert torch.cuda.memory_stats()["num_ooms"] == num_shortages
    del others


def test_graphs_keep_to_the_memory_planned_for_them(either_dir: Path) -> None:
    with make_llm(either_dir) as llm:
        for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[5:]):
            for _ in range(3):
                tokens_of(llm, prompts)
        assert len(large_sizes(llm)) > 2
        segments = torch.cuda.memory_snapshot()
        pool = tuple(graphs_of(llm)._pool)
        reserved = sum(one["total_size"] for one in segments if tuple(one["segment_pool_id"]) == pool)
        assert 0 < reserved <= llm.description.memory.graphs


def test_a_step_that_cannot_be_captured_is_computed(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real capture that fails half-way: the step is launched one by one, and so are the next ones."""
    run_step = StepGraphs._run_step

    def fail(graphs: StepGraphs, rows: torch.Tensor, size: StepSize) -> Any:
        result = run_step(graphs, rows, size)
        if size.num_prompts and torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("no memory")
        return result

    with make_llm(model_dir) as llm:
        expected = tokens_of(llm)
    monkeypatch.setattr(StepGraphs, "_run_step", fail)
    with make_llm(model_dir) as llm:
        assert not large_sizes(llm)
        assert tokens_of(llm) == expected
        assert tokens_of(llm) == expected
        assert any(not size.num_tokens for size in graphs_of(llm)._captured), "decode steps are captured"
