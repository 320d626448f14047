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
from tokenmill.engine.plan import BatchPlan, NewSlot, Row, RowOutput
from tokenmill.runtime.program_loading import StepLimits, load_executor
from tokenmill.runtime.program_runner import ProgramRunner
from tokenmill.runtime.slot_runner import NOT_FINITE
from tokenmill.runtime.slot_state import SlotState
from tokenmill.sampling.slot_params import SlotSamplingParams
from tokenmill.sampling_params import SamplingParams

pytestmark = pytest.mark.spec("C1")
LIMITS = StepLimits(max_batch_size=4, max_num_tokens=64, max_seq_len=64, num_blocks=40, tokens_per_block=4)
PROMPTS = [random_tokens(11, vocab_size=VOCAB_SIZE), random_tokens(6, seed=1, vocab_size=VOCAB_SIZE)]


class Clock:
    """Time that passes by one unit with every look."""

    def __init__(self, unit: float = 0.0) -> None:
        self.unit = unit
        self.now = 0.0

    def __call__(self) -> float:
        self.now += self.unit
        return self.now


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), weight_scale=0.3)


def make_runner(model_dir: Path, clock: Clock | None = None, **sampling: float) -> ProgramRunner:
    """A runner whose slots 2 and 0 hold the prompts, computed."""
    package = build(model_dir, device="cpu", quantization="int8", capture="dispatch", opt_level=1, max_seq_len=64)
    executor = load_executor(package, LIMITS, torch.bfloat16, num_threads=2)
    slots = SlotState(4, 64, 4, torch.device("cpu"))
    runner = ProgramRunner(executor, slots, SlotSamplingParams(5, VOCAB_SIZE, torch.device("cpu")), clock or Clock())
    new = [
        NewSlot(slot, tuple(prompt), len(prompt), tuple(range(first, first + 16)), SamplingParams(**sampling), 7, 0, ())
        for slot, first, prompt in zip((2, 0), (1, 20), PROMPTS, strict=True)
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


def test_repeated_steps_give_the_tokens_of_single_ones(model_dir: Path) -> None:
    one, many = make_runner(model_dir), make_runner(model_dir)
    singles = [decode(one, start) for start in range(13)]
    assert {len(tokens) for step in singles for tokens in step} == {1}
    expected = [[step[index][0] for step in singles] for index in range(2)]
    found = decode(many, 0, max_repeats=5), decode(many, 5, max_repeats=8)
    assert [first + second for first, second in zip(*found, strict=True)] == expected
    assert len(set(expected[0])) > 3, "one token again and again proves little"


def test_somebody_waits(model_dir: Path) -> None:
    runner = make_runner(model_dir)
    runner.interrupt_when(lambda: True)
    assert [len(tokens) for tokens in decode(runner, 0, max_repeats=8)] == [1, 1]
    looks = iter([False, False, True])
    runner.interrupt_when(lambda: next(looks))
    assert [len(tokens) for tokens in decode(runner, 1, max_repeats=8)] == [3, 3]


def test_slow_steps_are_told_at_once(model_dir: Path) -> None:
    assert [len(tokens) for tokens in decode(make_runner(model_dir, Clock(0.02)), 0, max_repeats=8)] == [1, 1]
    assert 1 < len(decode(make_runner(model_dir, Clock(0.003)), 0, max_repeats=8)[0]) < 8


def test_what_is_not_greedy_is_not_repeated(model_dir: Path) -> None:
    runner = make_runner(model_dir, temperature=0.8)
    assert [len(tokens) for tokens in decode(runner, 0, max_repeats=8)] == [1, 1]


def test_logits_that_are_not_finite_end_the_repetition(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before is told; the step itself comes first in the next plan, and fails its row."""
    runner = make_runner(model_dir)
    executor = runner._executor
    found, count = executor.most_likely, 0

    def most_likely() -> np.ndarray:
        nonlocal count
        count += 1
        tokens = found()
        return np.array([tokens[0], -1], np.int32) if count >= 4 else tokens

    monkeypatch.setattr(executor, "most_likely", most_likely)
    assert [len(tokens) for tokens in decode(runner, 0, max_repeats=8)] == [3, 3]
    rows = tuple(Row(slot, len(prompt) + 3, 1, sample=True) for slot, prompt in zip((2, 0), PROMPTS, strict=True))
    output = runner.run(BatchPlan(9, rows, max_repeats=8))
    assert output.rows[0].token_id is not None and output.rows[0].more_token_ids == ()
    assert output.rows[1].error == NOT_FINITE
