"""Runners of a model's layers and of a built engine's program: measured, planned and captured alike on a GPU."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch

from tests.support.pretended_gpu import BYTES_PER_TOKEN, MIB, WEIGHT_BYTES, PretendedGpu
from tests.support.tiny_checkpoint import write_tiny_model
from tests.support.tiny_programs import tiny_package
from tokenmill.checkpoints.base import Checkpoint, open_checkpoint
from tokenmill.config import KvCacheConfig, LlmArgs
from tokenmill.errors import OutOfMemoryError
from tokenmill.executor import runner_factory
from tokenmill.executor.description import EngineDescription
from tokenmill.executor.runner_factory import make_model_runner
from tokenmill.kv_cache.tensors import allocate_caches
from tokenmill.models.config import ModelConfig
from tokenmill.runtime.memory_planner import MemoryPlan
from tokenmill.runtime.memory_probe import GRAPHS_ROOM, sampling_bytes
from tokenmill.runtime.model_loader import load_model
from tokenmill.runtime.model_runner import ModelRunner, StepModel
from tokenmill.runtime.step_sizes import StepSize
from tokenmill.runtime.torch_program import TorchProgram
from tokenmill.runtime.weight_decoding import decode_weight

pytestmark = pytest.mark.spec("C1", "C3")
CPU = torch.device("cpu")
MAX_TOKENS, MAX_ROWS, BLOCK = 1024, 6, 16
FREE = 700 * MIB


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    return PretendedGpu(monkeypatch, FREE)


class Started(NamedTuple):
    runner: ModelRunner
    description: EngineDescription
    sizes: set[StepSize]


def step_model(way: str, args: LlmArgs, checkpoint: Checkpoint, gpu: PretendedGpu) -> StepModel:
    config = ModelConfig.from_hf(checkpoint.hf_config)
    if way == "direct":
        return load_model(args, config, checkpoint, CPU, torch.float32, gpu, None)
    package = tiny_package(checkpoint.hf_config, {tensor.name: tensor.load() for tensor in checkpoint.tensors()})
    weights = {one.name: decode_weight(one, package.weights[one.name]) for one in package.program.weights}
    return TorchProgram(package.program, weights, gpu)


def start(way: str, checkpoint: Checkpoint, gpu: PretendedGpu, *, num_sharing: int = 1, **changes: object) -> Started:
    args = LlmArgs(model=str(checkpoint.path), backend="torch", kv_cache_config=KvCacheConfig(), **changes)
    config = ModelConfig.from_hf(checkpoint.hf_config)
    description = EngineDescription(
        model=config,
        device="cpu",
        dtype="float32",
        cache_dtype="float32",
        attn_backend="triton",
        max_batch_size=MAX_ROWS,
        max_num_tokens=MAX_TOKENS,
        max_seq_len=512,
        enable_chunked_prefill=True,
        memory=MemoryPlan(0, 0, 0, 0, num_blocks=7, tokens_per_block=BLOCK, kv_bytes_per_token=0, free=None),
    )
    make_caches = partial(
        allocate_caches,
        config.num_layers,
        tokens_per_block=BLOCK,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=CPU,
    )
    model = step_model(way, args, checkpoint, gpu)
    runner, description = make_model_runner(args, description, model, make_caches, num_sharing=num_sharing)
    return Started(runner, description, set() if runner._graphs is None else set(runner._graphs._captured))


@pytest.mark.parametrize("way", ["direct", "engine"])
def test_the_largest_steps_are_measured_and_captured(way: str, checkpoint: Checkpoint, gpu: PretendedGpu) -> None:
    started = start(way, checkpoint, gpu)
    memory, config = started.description.memory, started.description.model
    assert gpu.measured == [MAX_TOKENS, MAX_ROWS], "prompts, which graphs have too, and decode"
    assert memory.weights == WEIGHT_BYTES
    assert memory.activations == max(MAX_TOKENS * BYTES_PER_TOKEN, sampling_bytes(MAX_ROWS * config.vocab_size))
    assert memory.graphs == GRAPHS_ROOM + MAX_TOKENS * BYTES_PER_TOKEN
    left = FREE - memory.weights - memory.activations - memory.graphs - memory.slots
    assert 0.89 * left < memory.kv_cache <= 0.9 * left
    assert started.runner._caches[0][0].shape[0] == memory.num_blocks
    of_prompts = {size for size in started.sizes if size.num_tokens}
    assert {size.num_tokens for size in of_prompts} == {MAX_TOKENS}
    assert {size.num_rows for size in started.sizes - of_prompts} == {1, 2, 4, 6}
    assert set(gpu.pools) == {0}, "all in one memory"


def test_both_ways_plan_and_capture_the_same(
    checkpoint: Checkpoint, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the largest step is too large for a graph, and where the device is shared."""
    monkeypatch.setattr(runner_factory, "MAX_CAPTURED_TOKENS", 768)
    direct, engine = (start(way, checkpoint, gpu, num_sharing=2) for way in ("direct", "engine"))
    assert direct.description.memory == engine.description.memory
    assert direct.sizes == engine.sizes
    assert max(size.num_tokens for size in direct.sizes) == 768
    assert gpu.measured == [MAX_TOKENS, 768, MAX_ROWS] * 2
    assert direct.description.memory.free == FREE // 2 + WEIGHT_BYTES // 2


@pytest.mark.parametrize("way", ["direct", "engine"])
def test_without_graphs_their_memory_is_the_caches(way: str, checkpoint: Checkpoint, gpu: PretendedGpu) -> None:
    with_graphs = start(way, checkpoint, gpu).description.memory
    gpu.measured.clear()
    started = start(way, checkpoint, gpu, enable_cuda_graphs=False)
    assert gpu.measured == [MAX_TOKENS] and not started.sizes
    assert started.description.memory.graphs == 0
    assert started.description.memory.kv_cache > with_graphs.kv_cache


@pytest.mark.parametrize("way", ["direct", "engine"])
def test_a_step_that_does_not_fit_is_refused_with_a_remedy(way: str, checkpoint: Checkpoint, gpu: PretendedGpu) -> None:
    gpu.max_tokens = MAX_TOKENS - 1
    with pytest.raises(OutOfMemoryError, match="max_num_tokens"):
        start(way, checkpoint, gpu)


@pytest.mark.parametrize("way", ["direct", "engine"])
def test_elsewhere_nothing_is_measured(way: str, checkpoint: Checkpoint) -> None:
    if torch.cuda.is_available():
        pytest.skip("attention is pretended for a machine without a GPU")
    with pytest.MonkeyPatch.context() as patch:
        gpu = PretendedGpu(patch, FREE)
    started = start(way, checkpoint, gpu)
    assert started.description.memory.num_blocks == 7 == started.runner._caches[0][0].shape[0]
    assert not gpu.measured and not started.sizes
