"""Built engines on a GPU: the tokens of the CPU, with CUDA graphs and without, under every way of scheduling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.test_engine import GPU_WAYS, PROMPTS, make_llm, tokens_of
from tests.support.tiny_checkpoint import write_tiny_moe_model
from tokenmill import LLM, SamplingParams
from tokenmill.builder.build import build

pytestmark = [pytest.mark.gpu, pytest.mark.spec("C1")]


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_moe_model(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[list[int]]:
    with make_llm(model_dir, device="cpu", backend="torch") as llm:
        return tokens_of(llm)


@pytest.mark.parametrize("way", GPU_WAYS)
def test_greedy_tokens_are_those_of_the_torch_backend(model_dir: Path, expected: list[list[int]], way: str) -> None:
    with make_llm(model_dir, backend="engine", **GPU_WAYS[way]) as llm:
        assert llm.description.backend == "engine"
        assert llm.description.device.startswith("cuda")
        assert tokens_of(llm) == expected
        if way == "preempted":
            assert llm.stats().num_preemptions > 0
        assert tokens_of(llm) == expected  # a second time: on used slots, blocks and graphs
        llm.check_integrity()


def test_an_engine_directory_and_quantized_weights(model_dir: Path, expected: list[list[int]], tmp_path: Path) -> None:
    folder = build(model_dir, device="cuda", dtype="float32", max_seq_len=512).save(tmp_path / "engine")
    with LLM(folder) as llm:
        assert tokens_of(llm) == expected
    params = SamplingParams(max_tokens=1, logprobs=0)
    with make_llm(model_dir, backend="engine") as exact, make_llm(model_dir, quantization="q8_0", dtype="auto") as llm:
        pairs: Any = zip(exact.generate(PROMPTS, params), llm.generate(PROMPTS, params), strict=True)
        differences = [abs(a.outputs[0].cumulative_logprob - b.outputs[0].cumulative_logprob) for a, b in pairs]
    assert max(differences) < 0.3


@pytest.mark.parametrize("way", ["graphs and overlap", "eager", "chunked"])
def test_a_mixture_of_experts(moe_dir: Path, way: str) -> None:
    """In float32, inside graphs too."""
    with make_llm(moe_dir, device="cpu", backend="torch") as llm:
        wanted = tokens_of(llm)
    with make_llm(moe_dir, backend="engine", **GPU_WAYS[way]) as llm:
        assert llm.description.backend == "engine"
        assert tokens_of(llm) == wanted


def test_a_mixture_of_experts_in_bfloat16(moe_dir: Path) -> None:
    """The experts' kernels, inside graphs: near float32, and the same tokens as eagerly."""
    params = SamplingParams(max_tokens=1, logprobs=0)
    with make_llm(moe_dir, device="cpu", backend="torch") as exact:
        expected: Any = exact.generate(PROMPTS, params)
    with make_llm(moe_dir, backend="engine", dtype="bfloat16") as llm:
        actual: Any = llm.generate(PROMPTS, params)
        tokens = tokens_of(llm)
    with make_llm(moe_dir, backend="engine", dtype="bfloat16", enable_cuda_graphs=False) as llm:
        assert tokens_of(llm) == tokens
    pairs = zip(actual, expected, strict=True)
    differences = [abs(a.outputs[0].cumulative_logprob - b.outputs[0].cumulative_logprob) for a, b in pairs]
    assert sorted(differences)[len(differences) // 2] < 0.3
