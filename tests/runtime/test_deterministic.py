"""`LLM(deterministic=True)`: a prompt has the same tokens, and the same log-probabilities to the last bit, however its
steps are cut and whatever is computed beside it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.test_logits import CASES
from tests.runtime.test_cpu_program import LIMITS, Sequences
from tests.support.tiny_checkpoint import VOCAB_SIZE, write_tiny_model
from tests.support.tiny_models import random_tokens, tiny_hf_model
from tokenmill import LLM, KvCacheConfig, SamplingParams, SchedulerConfig
from tokenmill.builder.build import build
from tokenmill.config import CapacitySchedulerPolicy, LlmArgs
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.runtime.cpu_program import CpuExecutor
from tokenmill.runtime.model_loader import check_deterministic

pytestmark = pytest.mark.spec("H3")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), weight_scale=0.1)


# ---- logits of a CPU's programs --------------------------------------------------------------------------------------

WAYS = {
    "alone and whole": [[(0, 170)]],
    "in chunks": [[(0, 31)], [(0, 1)], [(0, 64)], [(0, 74)]],
    "in company": [[(0, 1), (1, 1), (2, 90)], [(1, 7), (0, 150), (2, 30)], [(2, 1), (0, 19)]],
    "decoded": [[(0, 140)], *([(0, 1)] for _ in range(30))],
}
"""Tokens of each step by slot; the sequence of slot 0 is looked at."""


def logits_of(executor: CpuExecutor, steps: list[list[tuple[int, int]]]) -> torch.Tensor:
    """[170, V] of slot 0."""
    tokens = [random_tokens(200, seed=slot) for slot in range(3)]
    sequences, found = Sequences(executor), []
    for step in steps:
        rows = [(slot, tokens[slot][sequences.lens[slot] :][:count]) for slot, count in step]
        for (slot, _), logits in zip(step, sequences.step(rows), strict=True):
            if slot == 0:
                found.append(logits)
    return torch.cat(found)


def check_logits(package: Any, cache_dtype: torch.dtype) -> None:
    make = partial(CpuExecutor, package, LIMITS.arrays(), LIMITS.num_blocks, cache_dtype)
    results = {}
    for way, steps in WAYS.items():
        executor = make(2 if way == "in company" else 1, deterministic=True)
        results[way] = logits_of(executor, steps)
        executor.close()
    for way, logits in results.items():
        assert torch.equal(logits, results["alone and whole"]), way


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["none", "q4_0"])
def test_logits_of_a_program(model_dir: Path, quantization: str, cache_dtype: torch.dtype) -> None:
    package = build(model_dir, device="cpu", quantization=quantization, capture="dispatch", max_seq_len=320)
    check_logits(package, cache_dtype)


def test_without_it_bits_depend_on_how_a_prompt_is_computed(model_dir: Path) -> None:
    """What the tests above would see if the mode did nothing."""
    package = build(model_dir, device="cpu", quantization="none", capture="dispatch", max_seq_len=320)
    results = []
    for way in ("alone and whole", "decoded"):
        executor = CpuExecutor(package, LIMITS.arrays(), LIMITS.num_blocks, torch.float32, 1)
        results.append(logits_of(executor, WAYS[way]))
        executor.close()
    assert not torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_moe"])
def test_logits_of_programs_with_windows_or_experts(model_type: str, tmp_path: Path) -> None:
    changes = {"sliding_window": 37} if model_type == "gemma3" else {}
    hf_type, others = next(case for name, case in CASES.items() if name.startswith(model_type))
    tiny_hf_model(hf_type, **{**others, **changes, "max_position_embeddings": 512}).save_pretrained(tmp_path)
    options = {"quantization": "none", "capture": "dispatch", "max_seq_len": 320}
    check_logits(build(tmp_path, device="cpu", **options), torch.float32)


# ---- tokens of an engine ---------------------------------------------------------------------------------------------

PROMPT = random_tokens(75, vocab_size=VOCAB_SIZE)
OTHERS = [random_tokens(3 + 2 * index, seed=index + 1, vocab_size=VOCAB_SIZE) for index in range(63)]
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=0)
NO_REUSE = KvCacheConfig(max_tokens=16384, tokens_per_block=16, enable_block_reuse=False)

CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "chunked": {"max_num_tokens": 64, "enable_chunked_prefill": True},
    "prefix cache": {"kv_cache_config": KvCacheConfig(max_tokens=16384, tokens_per_block=16)},
    "preempted": {
        "kv_cache_config": KvCacheConfig(max_tokens=640, tokens_per_block=16, enable_block_reuse=False),
        "scheduler_config": SchedulerConfig(capacity_scheduler_policy=CapacitySchedulerPolicy.MAX_UTILIZATION),
    },
    "small batches": {"max_batch_size": 5},
}
DEVICES = [
    pytest.param({"device": "cpu"}, id="cpu"),
    *(
        pytest.param({"device": "cuda", "dtype": "bfloat16", **changes}, id=name, marks=pytest.mark.gpu)
        for name, changes in {
            "gpu": {},
            "gpu-eager": {"enable_cuda_graphs": False},
            "gpu-fp8": {"quantization": "fp8"},
        }.items()
    ),
]


def answers(llm: LLM, num_others: int) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of `PROMPT` among others."""
    prompts = [*OTHERS[: num_others // 2], PROMPT, *OTHERS[num_others // 2 : num_others]]
    outputs: Any = llm.generate(prompts, PARAMS, use_tqdm=False)
    found = outputs[num_others // 2].outputs[0]
    return found.token_ids, [entry[token].logprob for token, entry in zip(found.token_ids, found.logprobs, strict=True)]


@pytest.mark.parametrize("options", DEVICES)
def test_a_prompt_has_the_same_answer_in_any_company(model_dir: Path, options: dict[str, Any]) -> None:
    shared = {"max_batch_size": 64, "max_seq_len": 256, "kv_cache_config": NO_REUSE, "deterministic": True, **options}
    expected = None
    for name, changes in CHANGES.items():
        with LLM(model_dir, **{**shared, **changes}) as llm:
            for num_others in (0, 7, 63):
                found = answers(llm, num_others)
                expected = expected or found
                assert found == expected, (name, num_others)
            if name == "prefix cache":  # again, with the answer of before in the cache
                llm.generate([PROMPT + expected[0][:-3]], PARAMS, use_tqdm=False)
                assert answers(llm, 7) == expected
                assert llm.stats().kv_cache.num_hit_tokens > 0
            if name == "preempted":
                assert llm.stats().num_preemptions > 0


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_the_torch_backend_on_a_cpu_is_refused(model_dir: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="backend='engine'") as caught:
        LLM(model_dir, device="cpu", backend="torch", deterministic=True)
    assert caught.value.field == "deterministic"


@pytest.mark.gpu
def test_programs_that_compute_in_float32_on_a_gpu_are_refused(model_dir: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="float32") as caught:
        LLM(model_dir, device="cuda", backend="engine", dtype="bfloat16", deterministic=True)
    assert caught.value.field == "deterministic"


def test_float32_on_a_gpu_is_refused() -> None:
    args = LlmArgs(model="m", deterministic=True)
    with pytest.raises(UnsupportedFeatureError, match="bfloat16") as caught:
        check_deterministic(args, "torch", torch.device("cuda"), torch.float32)
    assert caught.value.field == "deterministic"
    check_deterministic(args, "torch", torch.device("cuda"), torch.bfloat16)
    check_deterministic(LlmArgs(model="m"), "torch", torch.device("cpu"), torch.float32)
