"""Programs as native steps on the CPU: every architecture and every number format against the definitions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.test_logits import COMPILED_CASES
from tests.support.programs import captured, compiled, program_weights
from tests.support.tiny_checkpoint import VOCAB_SIZE, write_tiny_model
from tests.support.tiny_models import random_tokens, relative_error, tiny_hf_model
from tests.support.tiny_programs import tiny_package
from tokenmill.builder.build import build
from tokenmill.engine.plan import Interruption, Row
from tokenmill.ops.cpu.compile_processes import compile_all
from tokenmill.ops.cpu.jit import NativeFunction
from tokenmill.runtime import cpu_program
from tokenmill.runtime.cpu_program import CpuExecutor
from tokenmill.runtime.program_executor import TorchExecutor
from tokenmill.runtime.program_loading import StepLimits, allocate_program_caches, load_torch_program

pytestmark = pytest.mark.spec("C1", "E4")
TOLERANCE = 1e-4


class Sequences:
    """Drives an executor: sequences that grow, in slots with blocks of their own."""

    def __init__(self, executor: CpuExecutor | TorchExecutor, max_batch_size: int = 4, num_blocks: int = 96) -> None:
        arrays = executor.arrays
        self.executor = executor
        self.tokens = np.zeros((max_batch_size, 1024), np.int64)
        width = arrays.block_tables.shape[1]
        blocks = np.random.default_rng(0).permutation(np.arange(1, num_blocks))
        self.tables = blocks[: max_batch_size * width].reshape(max_batch_size, width).astype(np.int32)
        self.lens = [0] * max_batch_size

    def step(self, rows: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
        """Append tokens to slots (rows of one token first); logits of all tokens of each row."""
        plan = []
        for slot, token_ids in rows:
            start = self.lens[slot]
            self.tokens[slot, start : start + len(token_ids)] = token_ids
            plan.append(Row(slot, start, len(token_ids), sample=True))
            self.lens[slot] += len(token_ids)
        self.executor.arrays.fill(plan, self.tokens, self.tables)
        last = torch.from_numpy(self.executor.run().copy())
        logits = torch.from_numpy(self.executor.logits_at(range(sum(len(token_ids) for _, token_ids in rows))))
        parts = list(logits.split([len(token_ids) for _, token_ids in rows]))
        assert torch.equal(last, torch.stack([part[-1] for part in parts]))
        return parts


LIMITS = StepLimits(max_batch_size=4, max_num_tokens=320, max_seq_len=320, num_blocks=96, tokens_per_block=16)


def executor_of(package: Any, *, num_threads: int = 1, cache_dtype: torch.dtype = torch.float32) -> CpuExecutor:
    return CpuExecutor(package, LIMITS.arrays(), LIMITS.num_blocks, cache_dtype, num_threads)


def torch_executor_of(package: Any) -> TorchExecutor:
    """The same by torch, whatever the engine was built for."""
    cpu = torch.device("cpu")
    caches = allocate_program_caches(package.program, LIMITS.num_blocks, LIMITS.tokens_per_block, torch.float32, cpu)
    return TorchExecutor(load_torch_program(package, cpu), caches, LIMITS.arrays(), cpu)


def hf_logits(hf_model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = hf_model(torch.tensor([token_ids])).logits[0]
    return logits


@pytest.fixture(scope="module", params=COMPILED_CASES)
def hf_model(request: pytest.FixtureRequest) -> Any:
    model_type, changes = COMPILED_CASES[request.param]
    return tiny_hf_model(model_type, **changes)


STEPS = [[(0, 17)], [(1, 1), (0, 22)], [(0, 1), (1, 22)], [(0, 1)]]
"""Prompts in chunks beside decoding: (slot, tokens) of each step."""


def run_steps(executor: CpuExecutor | TorchExecutor, token_ids: list[list[int]]) -> list[torch.Tensor]:
    """Logits of all tokens of two sequences."""
    sequences, found, done = Sequences(executor), [[], []], [0, 0]
    for step in STEPS:
        rows = [(slot, token_ids[slot][done[slot] : done[slot] + count]) for slot, count in step]
        for (slot, count), part in zip(step, sequences.step(rows), strict=True):
            done[slot] += count
            found[slot].append(part)
    return [torch.cat(parts) for parts in found]


def fused_package(hf_model: Any) -> Any:
    """The engine with all passes, its memory planned, in float32."""
    graph = captured(hf_model)
    program = compiled(graph, max_tokens=LIMITS.max_num_tokens)
    weights = program_weights(program, graph, hf_model)
    encoded = {name: tensor.contiguous().numpy().view(np.uint8).reshape(-1) for name, tensor in weights.items()}
    package = tiny_package(hf_model.config.to_dict(), hf_model.state_dict())
    return dataclasses.replace(package, program=program, weights=encoded)


@pytest.mark.parametrize("make", [lambda one: tiny_package(one.config.to_dict(), one.state_dict()), fused_package])
def test_float32_gives_the_logits_of_transformers(hf_model: Any, make: Any) -> None:
    executor = executor_of(make(hf_model))
    token_ids = [random_tokens(41), random_tokens(23, seed=1)]
    for found, tokens in zip(run_steps(executor, token_ids), token_ids, strict=True):
        assert relative_error(found, hf_logits(hf_model, tokens)) < TOLERANCE
    executor.close()


def test_the_most_likely_tokens_are_the_next_input(hf_model: Any) -> None:
    """Steps that go on from each other give what torch gives, and write the step's integers as the host would."""
    package, found = fused_package(hf_model), []
    for executor in (executor_of(package, num_threads=2), torch_executor_of(package)):
        sequences, arrays = Sequences(executor), executor.arrays
        sequences.step([(2, random_tokens(9)), (0, random_tokens(5, seed=1))])
        sequences.step([(2, [3]), (0, [4])])
        tokens = executor.run_steps(5, 60.0, Interruption()).tolist()  # the same step again, and four more
        assert arrays.token_ids[:2].tolist() == [tokens[0][-2], tokens[1][-2]]
        assert (arrays.positions[:2].tolist(), arrays.kv_lens[:2].tolist()) == ([13, 9], [14, 10])
        found.append(tokens)
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), weight_scale=0.1)


def tokens_of_two() -> list[list[int]]:
    return [random_tokens(41, vocab_size=VOCAB_SIZE), random_tokens(23, seed=1, vocab_size=VOCAB_SIZE)]


FORMATS = ("none", "int8_group32", "int8_channel", "q4_0", "q4_1", "q5_0", "q8_0")


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("opt_level", [0, 1])
def test_every_format_is_near_float_math_on_the_same_values(model_dir: Path, quantization: str, opt_level: int) -> None:
    options: dict[str, Any] = {"quantization": quantization, "capture": "dispatch", "max_seq_len": 320}
    package = build(model_dir, device="cpu", opt_level=opt_level, **options)
    exact = build(model_dir, device="cuda", **options)  # the same rounded weights, with float activations
    executor = executor_of(package)
    for found, expected in zip(
        run_steps(executor, tokens_of_two()), run_steps(torch_executor_of(exact), tokens_of_two()), strict=True
    ):
        error = ((found - expected).norm() / expected.norm()).item()
        assert error < (1e-5 if quantization == "none" else 0.05)
        assert quantization == "none" or error > 1e-5, "the activations were not rounded"
    executor.close()


@pytest.mark.parametrize("quantization", ["none", "q4_0", "int8_group32"])
def test_the_number_of_threads_changes_no_bit(model_dir: Path, quantization: str) -> None:
    package = build(model_dir, device="cpu", quantization=quantization, capture="dispatch", max_seq_len=320)
    results = []
    for num_threads in (1, 2, 3):
        executor = executor_of(package, num_threads=num_threads)
        results.append(torch.cat(run_steps(executor, tokens_of_two())))
        executor.close()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("quantization", "tolerance"), [("none", 1e-5), ("q4_0", 2e-2)])
def test_decoding_gives_the_logits_of_prefill_at_every_length(
    model_dir: Path, quantization: str, tolerance: float
) -> None:
    """Integer products are equal bit by bit; attention adds up in another order, and a rounding may tip over."""
    package = build(model_dir, device="cpu", quantization=quantization, capture="dispatch", max_seq_len=320)
    executor = executor_of(package)
    token_ids = random_tokens(300, vocab_size=VOCAB_SIZE)
    sequences = Sequences(executor)
    (whole,) = sequences.step([(0, token_ids)])
    for position, token in enumerate(token_ids):
        (logits,) = sequences.step([(1, [token])])
        assert relative_error(logits[0], whole[position]) < tolerance, position
    executor.close()


def test_a_bfloat16_cache_is_near_a_float32_one(model_dir: Path) -> None:
    package = build(model_dir, device="cpu", quantization="none", capture="dispatch", max_seq_len=320)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        executor = executor_of(package, cache_dtype=dtype)
        results.append(torch.cat(run_steps(executor, tokens_of_two())))
        executor.close()
    error = relative_error(results[1], results[0])
    assert 1e-6 < error < 2e-2


def test_copied_blocks_hold_the_same_tokens(model_dir: Path) -> None:
    package = build(model_dir, device="cpu", quantization="none", capture="dispatch", max_seq_len=320)
    executor = executor_of(package)
    sequences = Sequences(executor)
    token_ids = random_tokens(40, vocab_size=VOCAB_SIZE)
    sequences.step([(0, token_ids[:39])])
    executor.copy_blocks(*(sequences.tables[slot, :3].tolist() for slot in (0, 2)))
    sequences.lens[2] = 39
    first, second = sequences.step([(0, token_ids[39:]), (2, token_ids[39:])])
    assert torch.equal(first, second)
    executor.close()


def test_compiling_kernels_is_progress(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = build(model_dir, device="cpu", quantization="none", capture="dispatch", max_seq_len=320)
    told: list[tuple[str, int, int]] = []
    needed: list[str] = []

    def compile_none(functions: Sequence[NativeFunction], num_processes: int, tell: Callable[[int, int], None]) -> None:
        """As if the last one were not in the cache."""
        needed.extend(dict.fromkeys(function.name for function in functions))
        tell(0, 1)
        compile_all(functions, num_processes)
        tell(1, 1)

    monkeypatch.setattr(cpu_program, "compile_all", compile_none)
    CpuExecutor(package, LIMITS.arrays(), 8, torch.float32, 1, lambda *progress: told.append(progress)).close()
    assert told == [("kernels", 0, 1), ("kernels", 1, 1)]
    assert len(needed) >= 8
    assert {"attention", "linear_float", "_lead", "_work"} <= set(needed)
