"""Greedy steps that are repeated natively give what one step at a time gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.single_thread import single_thread
from tests.support.tiny_checkpoint import VOCAB_SIZE, write_tiny_model
from tests.support.tiny_models import random_tokens
from tokenmill.builder.build import build
from tokenmill.engine.plan import BatchPlan, Interruption, NewSlot, Row, RowOutput
from tokenmill.errors import InvalidLogitsError
from tokenmill.runtime import program_runner
from tokenmill.runtime.program_executor import ProgramExecutor, TorchExecutor
from tokenmill.runtime.program_loading import (
    StepLimits,
    allocate_program_caches,
    load_executor,
    load_torch_program,
)
from tokenmill.runtime.program_runner import ProgramRunner
from tokenmill.runtime.slot_state import SlotState
from tokenmill.sampling.slot_params import SlotSamplingParams
from tokenmill.sampling_params import SamplingParams

pytestmark = pytest.mark.spec("C1")
LIMITS = StepLimits(max_batch_size=4, max_num_tokens=64, max_seq_len=64, num_blocks=40, tokens_per_block=4)
PROMPTS = [random_tokens(11, vocab_size=VOCAB_SIZE), random_tokens(6, seed=1, vocab_size=VOCAB_SIZE)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time ends no repetition here: on a busy machine three threads take longer for a few steps than users may wait."""
    monkeypatch.setattr(program_runner, "WATCHED_SECONDS", 60.0)
    monkeypatch.setattr(program_runner, "UNWATCHED_SECONDS", 90.0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), weight_scale=0.3)


def make_runner(
    model_dir: Path, end_ids: tuple[int, ...] = (), quantization: str = "int8", num_threads: int = 2, **sampling: float
) -> ProgramRunner:
    """A runner whose slots 2 and 0 hold the prompts, computed; `end_ids` are those of the first."""
    package = build(model_dir, device="cpu", quantization=quantization, capture="dispatch", opt_level=1, max_seq_len=64)
    return runner_of(load_executor(package, LIMITS, torch.bfloat16, num_threads=num_threads), end_ids, **sampling)


def runner_of(executor: ProgramExecutor, end_ids: tuple[int, ...] = (), **sampling: float) -> ProgramRunner:
    slots = SlotState(4, 64, 4, torch.device("cpu"))
    runner = ProgramRunner(executor, slots, SlotSamplingParams(5, VOCAB_SIZE, torch.device("cpu")))
    params = SamplingParams(**sampling)
    new = [
        NewSlot(slot, tuple(prompt), len(prompt), tuple(range(first, first + 16)), params, 7, 0, ids)
        for slot, first, prompt, ids in zip((2, 0), (1, 20), PROMPTS, (end_ids, ()), strict=True)
    ]
    rows = tuple(Row(one.slot, 0, one.num_prompt_tokens, sample=True) for one in new)
    runner.run(BatchPlan(0, rows, tuple(new)))
    return runner


def decode(runner: ProgramRunner, start: int, max_repeats: int = 1) -> list[list[int]]:
    """Tokens that both sequences give; `start`: tokens after the prompts that are computed already."""
    rows = tuple(Row(slot, len(prompt) + start, 1, sample=True) for slot, prompt in zip((2, 0), PROMPTS, strict=True))
    output = runner.run(BatchPlan(1 + start, rows, max_repeats=max_repeats))
    return [tokens_of(row) for row in output.rows]


def tokens_of(row: RowOutput) -> list[int]:
    assert row.token_id is not None
    return [row.token_id, *row.more_token_ids]


def singles(runner: ProgramRunner, num_steps: int) -> list[list[int]]:
    """Tokens of both sequences, a step at a time."""
    steps = [decode(runner, start) for start in range(num_steps)]
    assert {len(tokens) for step in steps for tokens in step} == {1}
    return [[step[index][0] for step in steps] for index in range(2)]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_repeated_steps_give_the_tokens_of_single_ones(model_dir: Path, num_threads: int) -> None:
    expected, many = singles(make_runner(model_dir), 13), make_runner(model_dir, num_threads=num_threads)
    found = decode(many, 0, max_repeats=5), decode(many, 5, max_repeats=8)
    assert [first + second for first, second in zip(*found, strict=True)] == expected
    assert len(set(expected[0])) > 3, "one token again and again proves little"


def test_somebody_waits(model_dir: Path) -> None:
    """A step that is under way is ended; those who put something into the inbox wait for no other."""
    runner, interruption = make_runner(model_dir), Interruption()
    runner.interrupt_when(interruption)
    interruption.set()
    assert [len(tokens) for tokens in decode(runner, 0, max_repeats=8)] == [1, 1]
    interruption.clear()
    assert [len(tokens) for tokens in decode(runner, 1, max_repeats=8)] == [8, 8]


def test_an_end_token_ends_the_repetition(model_dir: Path) -> None:
    """The sequence's own ones alone; more of them than the runner keeps are left to the scheduler."""
    expected = singles(make_runner(model_dir), 8)
    end = next(index for index in range(2, 7) if expected[0][index] not in expected[0][:index])
    runner = make_runner(model_dir, end_ids=(VOCAB_SIZE + 3, expected[0][end]))
    assert [len(tokens) for tokens in decode(runner, 0, max_repeats=8)] == [end + 1] * 2
    runner = make_runner(model_dir, end_ids=(*range(VOCAB_SIZE, VOCAB_SIZE + 9), expected[0][end]))
    assert [len(tokens) for tokens in decode(runner, 0, max_repeats=8)] == [8, 8]


def test_what_is_watched_is_told_sooner(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, seconds = make_runner(model_dir), []
    run_steps = runner._executor.run_steps

    def noted(max_steps: int, limit: float, interruption: Interruption) -> np.ndarray:
        seconds.append(limit)
        return run_steps(max_steps, limit, interruption)

    monkeypatch.setattr(runner._executor, "run_steps", noted)
    rows = tuple(Row(slot, len(prompt), 1, sample=True) for slot, prompt in zip((2, 0), PROMPTS, strict=True))
    for is_watched in (True, False):
        runner.run(BatchPlan(1, rows, max_repeats=8, is_watched=is_watched))
    assert seconds == [60.0, 90.0]


def test_what_is_not_greedy_is_not_repeated(model_dir: Path) -> None:
    runner = make_runner(model_dir, temperature=0.8)
    assert [len(tokens) for tokens in decode(runner, 0, max_repeats=8)] == [1, 1]


@pytest.mark.parametrize("make", ["native", "torch"])
def test_logits_that_are_not_finite_end_the_repetition(model_dir: Path, make: str) -> None:
    """What came before is told; the step itself comes first in the next plan, and fails its row."""
    package = build(model_dir, device="cpu", quantization="none", capture="dispatch", opt_level=1, max_seq_len=64)

    def new_runner() -> ProgramRunner:
        if make == "native":
            return runner_of(load_executor(package, LIMITS, torch.float32, num_threads=2))
        cpu = torch.device("cpu")
        caches = allocate_program_caches(package.program, LIMITS.num_blocks, 4, torch.float32, cpu)
        return runner_of(TorchExecutor(load_torch_program(package, cpu), caches, LIMITS.arrays(), cpu))

    expected = singles(new_runner(), 8)
    bad = next(index for index in range(2, 7) if expected[1][index] not in {*expected[1][:index], *expected[0]})
    embedding = next(weight for weight in package.program.weights if "embed" in weight.name)
    rows_of_bytes = package.weights[embedding.name].reshape(embedding.shape[0], -1)
    before = rows_of_bytes[expected[1][bad]].copy()
    rows_of_bytes[expected[1][bad]] = 0xFF  # not a number, in every format of floats
    try:
        runner = new_runner()
        found = decode(runner, 0, max_repeats=8)
        assert found == [tokens[: bad + 1] for tokens in expected]
        output = runner.run(
            BatchPlan(
                9,
                tuple(
                    Row(slot, len(prompt) + bad + 1, 1, sample=True)
                    for slot, prompt in zip((2, 0), PROMPTS, strict=True)
                ),
                max_repeats=8,
            )
        )
    finally:
        rows_of_bytes[expected[1][bad]] = before
    assert output.rows[0].token_id == expected[0][bad + 1] and output.rows[0].more_token_ids == ()
    assert isinstance(output.rows[1].error, InvalidLogitsError)
