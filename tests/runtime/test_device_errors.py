"""Steps without memory are survived, and a device that failed is reported at once, by engines here and in workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.single_thread import single_thread
from tests.support.tiny_checkpoint import write_tiny_model
from tokenmill import LLM, KvCacheConfig, SamplingParams
from tokenmill.config import WorkerConfig
from tokenmill.errors import DeviceFaultError, OutOfMemoryError, TokenmillError
from tokenmill.runtime.device_errors import device_errors

pytestmark = pytest.mark.spec("F4")

FAULT = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later."
PROMPTS = [[5, 6, 7 + index, *range(20 * index)] for index in range(6)]
PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "max_batch_size": 4,
    "max_seq_len": 256,
    "kv_cache_config": KvCacheConfig(max_tokens=2048, tokens_per_block=16),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), OutOfMemoryError),
        (RuntimeError("CUDA error: out of memory"), OutOfMemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), OutOfMemoryError),
        (RuntimeError("Triton Error [CUDA]: out of memory"), OutOfMemoryError),
        (torch.AcceleratorError(FAULT), DeviceFaultError),
        (RuntimeError(FAULT), DeviceFaultError),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), DeviceFaultError),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), RuntimeError),
        (ValueError("CUDA error"), ValueError),
    ],
)
def test_errors_become_ours(error: Exception, expected: type[Exception]) -> None:
    with (
        pytest.raises(type(error) if not issubclass(expected, TokenmillError) else expected) as caught,
        device_errors(),
    ):
        raise error
    assert type(caught.value) is expected
    if issubclass(expected, TokenmillError):
        assert str(error).splitlines()[0] in str(caught.value)


def test_the_first_of_two_errors_counts() -> None:
    """A capture that fails for want of memory fails once more when it is ended."""
    with pytest.raises(OutOfMemoryError), device_errors():
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def test_what_the_step_held_is_freed() -> None:
    freed: list[bool] = []

    class Tensor:
        def __del__(self) -> None:
            freed.append(True)

    def step() -> None:
        tensor = Tensor()
        raise torch.OutOfMemoryError(f"no memory beside {type(tensor)}")

    with pytest.raises(OutOfMemoryError), device_errors():
        step()
    assert freed == [True]


def failing(run: Callable[..., Any], error: Exception, when: Callable[[int], bool]) -> Callable[..., Any]:
    """`run`, which raises instead on some calls."""
    count = 0

    def call(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if when(count):
            raise error
        return run(*arguments)

    return call


def tokens_of(llm: LLM) -> list[list[int]]:
    outputs: Any = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def test_an_engine_survives_steps_without_memory(model_dir: Path) -> None:
    with LLM(model_dir, device="cpu", **OPTIONS) as llm:
        expected = tokens_of(llm)
        executor = llm._executor._engine.runner._executor  # type: ignore[attr-defined]
        shortage = torch.OutOfMemoryError("CUDA out of memory.")
        executor.run_steps = failing(executor.run_steps, shortage, lambda count: count in (1, 4, 9))
        assert tokens_of(llm) == expected
        assert llm.stats().num_preemptions > 0
        llm.check_integrity()
        executor.run_steps = failing(executor.run_steps, shortage, lambda count: True)
        with pytest.raises(OutOfMemoryError, match="no memory left"):
            llm.generate([PROMPTS[0]], PARAMS, use_tqdm=False)
        del executor.run_steps
        assert tokens_of(llm) == expected
        llm.check_integrity()


def test_a_fault_ends_the_engine_at_once(model_dir: Path) -> None:
    llm = LLM(model_dir, device="cpu", **OPTIONS)
    executor = llm._executor._engine.runner._executor  # type: ignore[attr-defined]
    executor.run_steps = failing(executor.run_steps, torch.AcceleratorError(FAULT), lambda count: count == 3)
    with pytest.raises(DeviceFaultError, match="illegal memory access"):
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert llm.health().state == "unhealthy"
    with pytest.raises(TokenmillError):
        llm.generate([PROMPTS[0]], PARAMS, use_tqdm=False)
    llm.shutdown()


PATCH = """
import importlib.util, os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "tokenmill.runtime.program_runner":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            launch = module.ProgramRunner._launch

            def fail_once(runner, plan):
                if not os.path.exists(MARKER):
                    open(MARKER, "w").close()
                    raise RuntimeError(FAULT)
                return launch(runner, plan)

            module.ProgramRunner._launch = fail_once

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def test_a_worker_with_a_fault_is_started_again(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's first step fails as a device does; the second process computes what the first one could not."""
    marker = tmp_path / "failed"
    (tmp_path / "sitecustomize.py").write_text(f"MARKER, FAULT = {str(marker)!r}, {FAULT!r}\n{PATCH}")
    with LLM(model_dir, device="cpu", **OPTIONS) as llm:
        expected = tokens_of(llm)
    monkeypatch.syspath_prepend(tmp_path)  # workers find the same modules as this process
    workers = WorkerConfig(heartbeat_interval=0.1, restart_backoff=0.1)
    with LLM(model_dir, device="cpu", num_replicas=1, num_threads=1, worker_config=workers, **OPTIONS) as llm:
        assert tokens_of(llm) == expected
        assert marker.exists()
        assert llm.stats().workers.num_restarts == 1


# ---- on a GPU --------------------------------------------------------------------------------------------------------

GPU_OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "max_batch_size": 64, "max_seq_len": 1024, "max_num_tokens": 8192}
LONG = [[(7 * index + row) % 300 for index in range(900)] for row in range(32)]


def all_memory() -> list[torch.Tensor]:
    """Take everything that is free, in pieces that get smaller."""
    held, size = [], torch.cuda.mem_get_info()[0]
    while size >= 1 << 20:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return held


@pytest.mark.gpu
def test_another_program_takes_the_memory(model_dir: Path) -> None:
    """All memory is taken between two batches: steps fail, requests end or wait, and the engine goes on."""
    cache = KvCacheConfig(max_tokens=65_536, enable_block_reuse=False)
    with LLM(model_dir, enable_cuda_graphs=False, kv_cache_config=cache, **GPU_OPTIONS) as llm:
        before: Any = llm.generate(LONG, PARAMS, use_tqdm=False)
        torch.cuda.empty_cache()
        held = all_memory()
        results = [llm.generate_async(prompt, PARAMS) for prompt in LONG]
        endings = []
        for result in results:
            try:
                endings.append(result.result(timeout=60))
            except OutOfMemoryError as error:
                endings.append(error)
        held.clear()
        torch.cuda.empty_cache()
        assert any(isinstance(ending, OutOfMemoryError) for ending in endings)
        for ending, other in zip(endings, before, strict=True):
            assert isinstance(ending, OutOfMemoryError) or ending.outputs[0].token_ids == other.outputs[0].token_ids
        after: Any = llm.generate(LONG, PARAMS, use_tqdm=False)
        assert [one.outputs[0].token_ids for one in after] == [one.outputs[0].token_ids for one in before]
        llm.check_integrity()


@pytest.mark.gpu
def test_at_ninety_five_percent_the_largest_steps_run(model_dir: Path) -> None:
    """The cache takes what is left; the largest prompts, the largest batch and sampling with everything still fit."""
    cache = KvCacheConfig(free_gpu_memory_fraction=0.95, enable_block_reuse=False)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - (6 << 30), dtype=torch.uint8, device="cuda")  # a small device is filled sooner
    with LLM(model_dir, kv_cache_config=cache, **GPU_OPTIONS) as llm:
        params = [
            PARAMS,
            SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.8, top_p=0.9, top_k=300, seed=1),
            SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.8, presence_penalty=1.0, logprobs=5, seed=2),
        ]
        for one in params:
            outputs: Any = llm.generate([*LONG, *LONG], one, use_tqdm=False)
            assert all(output.outputs[0].finish_reason == "length" for output in outputs)
        assert llm.stats().num_preemptions == 0
    del held
