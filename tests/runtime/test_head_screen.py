"""Greedy steps with the head's screen give the tokens of the head's logits, and know when it does not help."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.documents import pages
from tests.support.tiny_checkpoint import VOCAB_SIZE, write_tiny_model
from tests.support.tiny_models import random_tokens
from tokenmill.builder.build import build
from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.engine.plan import Interruption, Row
from tokenmill.errors import ModelNotFoundError
from tokenmill.ops.cpu.cpu_features import best_dot_product
from tokenmill.ops.cpu.head_screen import can_screen
from tokenmill.runtime import head_screen
from tokenmill.runtime.cpu_memory import ProgramMemory
from tokenmill.runtime.cpu_program import CpuExecutor
from tokenmill.runtime.head_screen import MEASURED_STEPS
from tokenmill.runtime.program_loading import StepLimits
from tokenmill.tokenization import load_tokenizer

pytestmark = [
    pytest.mark.spec("C1"),
    pytest.mark.skipif(not can_screen("q8_0", best_dot_product()), reason="this processor has no screens"),
]
LIMITS = StepLimits(max_batch_size=2, max_num_tokens=128, max_seq_len=320, num_blocks=48, tokens_per_block=16)
TABLES = np.arange(1, 41, dtype=np.int32).reshape(2, 20)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), weight_scale=0.3)


def make_executor(model: Path, *, num_threads: int = 2, **options: Any) -> CpuExecutor:
    package = build(model, device="cpu", capture="dispatch", opt_level=1, max_seq_len=320, **options)
    return CpuExecutor(package, LIMITS.arrays(), LIMITS.num_blocks, torch.bfloat16, num_threads)


def start(executor: CpuExecutor, prompts: Sequence[list[int]]) -> None:
    """Compute prompts, and write the step of one token for each."""
    tokens = np.zeros((2, 320), np.int64)
    for slot, prompt in enumerate(prompts):
        tokens[slot, : len(prompt)] = prompt
        executor.arrays.fill([Row(slot, 0, len(prompt), sample=True)], tokens, TABLES)
        tokens[slot, len(prompt)] = executor.run_steps(1, 60.0, Interruption())[0, 0]
    rows = [Row(slot, len(prompt), 1, sample=True) for slot, prompt in enumerate(prompts)]
    executor.arrays.fill(rows, tokens, TABLES, max_repeats=200)


def next_token(executor: CpuExecutor) -> int:
    """Compute the step, whose token is compared with its logits, and write the next one."""
    tokens = executor.run_steps(1, 60.0, Interruption())[:, 0].copy()
    assert tokens.tolist() == executor.logits_at(range(len(tokens))).argmax(1).tolist()
    executor.arrays.advance(tokens)
    return int(tokens[0])


def check_steps(executor: CpuExecutor, num_steps: int) -> tuple[list[int], list[bool]]:
    """Go on from `start`; tokens, and whether the screen gave them."""
    assert executor.screen is not None
    found, screened = [], []
    for _ in range(num_steps):
        screened.append(executor.screen.is_ready)
        found.append(next_token(executor))
    return found, screened


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_tokens_are_those_of_the_logits(model_dir: Path, num_threads: int) -> None:
    executor = make_executor(model_dir, quantization="int8", num_threads=num_threads)
    start(executor, [random_tokens(20, vocab_size=VOCAB_SIZE)])
    tokens, screened = check_steps(executor, 120)
    assert sum(screened) > 8
    assert not any(screened[:MEASURED_STEPS]), "nothing is known of the first hidden states"
    assert len(set(tokens)) > 20
    executor.close()


def test_steps_with_logits_are_computed_in_full(model_dir: Path) -> None:
    """After steps with the screen, too."""
    executor = make_executor(model_dir, quantization="int8")
    start(executor, [random_tokens(20, vocab_size=VOCAB_SIZE)])
    assert executor.screen is not None
    while not executor.screen.is_ready:
        next_token(executor)
    token = int(executor.run_steps(1, 60.0, Interruption())[0, 0])
    logits = executor.run().copy()
    assert logits.shape == (1, VOCAB_SIZE)
    assert int(logits[0].argmax()) == token
    assert np.array_equal(logits, executor.logits_at([0]))
    executor.close()


def test_several_sequences_do_not_use_it(model_dir: Path) -> None:
    executor = make_executor(model_dir, quantization="int8")
    prompts = [random_tokens(count, seed=count, vocab_size=VOCAB_SIZE) for count in (20, 9)]
    start(executor, prompts)
    for _ in range(2 * MEASURED_STEPS):
        next_token(executor)
    assert executor.screen is not None
    assert not executor.screen.is_ready
    executor.close()


def test_a_screen_that_does_not_help_is_put_aside(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows that are all equal every tile has a largest logit; attempts become rare."""
    monkeypatch.setattr(head_screen, "MAX_PATIENCE", 40)
    package = build(model_dir, device="cpu", capture="dispatch", opt_level=1, max_seq_len=320, quantization="int8")
    name = package.program.operations[-1].weights["weight"]
    weights = {**package.weights, name: np.zeros_like(package.weights[name])}
    executor = CpuExecutor(dataclasses.replace(package, weights=weights), LIMITS.arrays(), 48, torch.bfloat16, 1)
    start(executor, [random_tokens(20, vocab_size=VOCAB_SIZE)])
    tokens, screened = check_steps(executor, 250)
    assert executor.screen is not None
    assert set(tokens) == {0}
    attempts = "".join("x" if one else " " for one in screened).split()
    pauses = "".join("x" if not one else " " for one in screened).split()
    assert {len(one) for one in attempts[:-1]} == {10}
    assert [len(one) for one in pauses][:4] == [MEASURED_STEPS, 2 * MEASURED_STEPS, 4 * MEASURED_STEPS, 40]
    executor.close()


def test_a_screen_serves_what_it_has_not_seen(model_dir: Path) -> None:
    """The steps it learned from choose what is read, not what comes out: hidden states without numbers included."""
    executor = make_executor(model_dir, quantization="int8")
    assert executor.screen is not None
    executor.screen._energy[:] = np.nan
    start(executor, [random_tokens(20, vocab_size=VOCAB_SIZE)])
    _, screened = check_steps(executor, 30)
    assert any(screened)
    executor.close()


@pytest.mark.parametrize("options", [{"quantization": "none"}, {"quantization": "int8_channel"}, {"debug": True}])
def test_other_heads_have_none(model_dir: Path, options: dict[str, Any]) -> None:
    if options.pop("debug", False):
        options = {"quantization": "int8", "debug_outputs": ("model.layers.1.mlp.down_proj",)}
    executor = make_executor(model_dir, **options)
    assert executor.screen is None
    start(executor, [random_tokens(20, vocab_size=VOCAB_SIZE)])
    next_token(executor)
    executor.close()


@pytest.mark.real_model
@pytest.mark.parametrize(("alias", "num_prompts"), [("smollm2:135m", 8), ("gemma3:270m", 1)])
def test_real_models_read_a_few_tiles(alias: str, num_prompts: int) -> None:
    """At 1,000 positions of SmolLM2's answers and more: the same tokens, and hardly any tile but the screen's."""
    try:
        path = resolve_model(alias, show_progress=False)
    except ModelNotFoundError as error:
        pytest.skip(f"{alias} cannot be fetched: {error}")
    executor = make_executor(path)
    assert executor.screen is not None
    tokens = load_tokenizer(path).encode("".join(page.read_text() for page in pages()))
    shares = []
    for prompt in np.reshape(tokens[: 100 * num_prompts], (-1, 100)).tolist():
        start(executor, [prompt])
        for _ in range(150):
            was_ready = executor.screen.is_ready
            next_token(executor)
            if was_ready:
                shares.append(executor.screen.share)
    assert len(shares) == 150 * num_prompts - MEASURED_STEPS
    assert np.mean(shares) < 0.03
    executor.close()


@pytest.mark.parametrize("quantization", ["int8", None])
def test_the_memory_of_a_screen_is_known_before(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, quantization: str | None
) -> None:
    """It is a part of the engine's memory plan; a float head has none."""
    reserved: list[int] = []
    reserve = ProgramMemory.reserve

    def noted(memory: ProgramMemory, num_bytes: int) -> int:
        reserved.append(num_bytes)
        return reserve(memory, num_bytes)

    monkeypatch.setattr(ProgramMemory, "reserve", noted)
    options = {} if quantization is None else {"quantization": quantization}
    package = build(model_dir, device="cpu", capture="dispatch", opt_level=1, max_seq_len=320, **options)
    executor = CpuExecutor(package, LIMITS.arrays(), LIMITS.num_blocks, torch.bfloat16, 1)
    expected = head_screen.screen_nbytes(package.program)
    assert (executor.screen is not None) == (expected > 0) == (quantization is not None)
    assert expected == 0 or expected in reserved
    executor.close()
