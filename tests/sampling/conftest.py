"""Helpers shared by the sampling tests, as fixtures: slots, whole sampling calls, a chi-square bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from tokenmill.engine.plan import NewSlot
from tokenmill.sampling.sampled_tokens import SampledTokens
from tokenmill.sampling.sampler import Sampler
from tokenmill.sampling.slot_params import SlotSamplingParams
from tokenmill.sampling_params import SamplingParams


@dataclass(frozen=True)
class Case:
    """One request's row: its logits and everything that decides its token."""

    logits: torch.Tensor  # [V]
    sampling: SamplingParams
    prompt: tuple[int, ...] = (1,)
    answer: tuple[int, ...] = ()
    seed: int = 0
    sequence_index: int = 0
    end_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.answer

    def new_slot(self, slot: int) -> NewSlot:
        return NewSlot(
            slot=slot,
            token_ids=self.tokens,
            num_prompt_tokens=len(self.prompt),
            block_ids=(),
            sampling=self.sampling,
            seed=self.seed,
            sequence_index=self.sequence_index,
            end_ids=self.end_ids,
            bad_words=self.bad_words,
        )


def _sample_cases(
    cases: Sequence[Case],
    slots: Sequence[int] | None = None,
    params: SlotSamplingParams | None = None,
    max_position: int | None = None,
    device: str = "cpu",
) -> SampledTokens:
    slots = list(range(len(cases))) if slots is None else list(slots)
    max_slots = max(slots, default=0) + 1
    if params is None:
        vocab_size = len(cases[0].logits) if cases else 8
        params = SlotSamplingParams(max_slots, vocab_size, device)
    params.assign([case.new_slot(slot) for case, slot in zip(cases, slots, strict=True)])
    # What lies behind a sequence's end in the buffer is left over from others: it must not matter.
    longest = max((len(case.tokens) for case in cases), default=1)
    buffer = torch.full((max_slots, longest + 3), 3, dtype=torch.int32)
    for case, slot in zip(cases, slots, strict=True):
        buffer[slot, : len(case.tokens)] = torch.tensor(case.tokens, dtype=torch.int32)
    logits = torch.stack([case.logits for case in cases]) if cases else torch.zeros(0, params.vocab_size)
    positions = torch.tensor([len(case.tokens) for case in cases], dtype=torch.int64)
    return Sampler(params).sample(
        logits.to(device),
        torch.tensor(slots, dtype=torch.int64, device=device),
        slots,
        positions.to(device),
        buffer.to(device),
        max_position=max_position,
    )


def _chi_square_bound(num_bins: int) -> float:
    """Chi-square that a right distribution exceeds once in about 3 million times (Wilson and Hilferty 1931)."""
    freedom = num_bins - 1
    return float(freedom * (1 - 2 / (9 * freedom) + 5 * (2 / (9 * freedom)) ** 0.5) ** 3)


def _chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square of counts against expected counts, cells that expect fewer than 10 put together."""
    observed, expected = observed.double(), expected.double()
    small = expected < 10
    if small.any():
        observed = torch.cat([observed[~small], observed[small].sum().reshape(1)])
        expected = torch.cat([expected[~small], expected[small].sum().reshape(1)])
    keep = expected > 0
    assert not observed[~keep].any()
    return float(((observed - expected)[keep].square() / expected[keep]).sum())


@pytest.fixture(scope="session")
def case_type() -> type[Case]:
    """The class of one request's row."""
    return Case


@pytest.fixture(scope="session")
def sample_cases() -> Callable[..., SampledTokens]:
    """Sample one step for some cases."""
    return _sample_cases


@pytest.fixture(scope="session")
def assert_distribution() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Fail unless drawn tokens fit exact probabilities."""

    def check(tokens: torch.Tensor, probabilities: torch.Tensor) -> None:
        observed = torch.bincount(tokens, minlength=len(probabilities))
        expected = probabilities.double() * len(tokens)
        num_cells = max(2, int((expected >= 10).sum()) + 1)
        assert _chi_square(observed, expected) < _chi_square_bound(num_cells)

    return check
