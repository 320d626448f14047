"""Programs as native steps on the CPU: every architecture and every number format against the definitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.test_logits import COMPILED_CASES
from tests.support.single_thread import single_thread
from tests.support.tiny_models import random_tokens, relative_error, tiny_hf_model
from tests.support.tiny_programs import tiny_package
from tokenmill.engine.plan import Row
from tokenmill.runtime.cpu_program import CpuExecutor
from tokenmill.runtime.program_loading import StepLimits

pytestmark = pytest.mark.spec("D5", "E4")
TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with single_thread():
        yield


class Sequences:
    """Drives an executor: sequences that grow, in slots with blocks of their own."""

    def __init__(self, executor: CpuExecutor, max_batch_size: int, num_blocks: int) -> None:
        arrays = executor.arrays
        self.executor = executor
        self._tokens = np.zeros((max_batch_size, 1024), np.int64)
        width = arrays.block_tables.shape[1]
        blocks = np.random.default_rng(0).permutation(np.arange(1, num_blocks))
        self._tables = blocks[: max_batch_size * width].reshape(max_batch_size, width).astype(np.int32)
        self._lens = [0] * max_batch_size

    def step(self, rows: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
        """Append tokens to slots (rows of one token first); logits of all tokens of each row."""
        plan = []
        for slot, token_ids in rows:
            start = self._lens[slot]
            self._tokens[slot, start : start + len(token_ids)] = token_ids
            plan.append(Row(slot, start, len(token_ids), sample=True))
            self._lens[slot] += len(token_ids)
        self.executor.arrays.fill(plan, self._tokens, self._tables)
        last = torch.from_numpy(self.executor.run().copy())
        logits = torch.from_numpy(self.executor.logits_at(range(sum(len(token_ids) for _, token_ids in rows))))
        parts = list(logits.split([len(token_ids) for _, token_ids in rows]))
        assert torch.equal(last, torch.stack([part[-1] for part in parts]))
        return parts


def executor_of(package: Any, *, num_threads: int = 1, cache_dtype: torch.dtype = torch.float32) -> CpuExecutor:
    limits = StepLimits(max_batch_size=4, max_num_tokens=128, max_seq_len=128, num_blocks=64, tokens_per_block=16)
    return CpuExecutor(package, limits.arrays(), limits.num_blocks, cache_dtype, num_threads)


def hf_logits(hf_model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = hf_model(torch.tensor([token_ids])).logits[0]
    return logits


@pytest.fixture(scope="module", params=COMPILED_CASES)
def hf_model(request: pytest.FixtureRequest) -> Any:
    model_type, changes = COMPILED_CASES[request.param]
    return tiny_hf_model(model_type, **changes)


def test_unfused_float32_gives_the_logits_of_transformers(hf_model: Any) -> None:
    executor = executor_of(tiny_package(hf_model.config.to_dict(), hf_model.state_dict()))
    sequences = Sequences(executor, 4, 64)
    first, second = random_tokens(40), random_tokens(23, seed=1)
    steps = [[(0, first[:17])], [(1, second[:1]), (0, first[17:39])], [(0, first[39:40]), (1, second[1:])]]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for rows in steps:
        for (slot, _), part in zip(rows, sequences.step(rows), strict=True):
            found[slot].append(part)
    for slot, token_ids in ((0, first), (1, second)):
        assert relative_error(torch.cat(found[slot]), hf_logits(hf_model, token_ids)) < TOLERANCE
    executor.close()
