"""The sampling kernel gives the tokens of the steps in `tokenmill.sampling`: in the interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from tokenmill.ops.sampling import SlotColumns
from tokenmill.sampling import steps
from tokenmill.sampling.exact import integer_weights
from tokenmill.sampling.random import draw, stream_key, uniforms

pytest.importorskip("triton")
from tokenmill.ops.triton.sampling import sample_tokens

pytestmark = pytest.mark.spec("E3")

PARAMETERS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0),
    (0.0, 5, 0.5, 0.0),
    (0.7, 1, 1.0, 0.0),
    (1.3, 20, 1.0, 0.0),
    (0.9, 0, 0.8, 0.0),
    (2.0, 300, 0.95, 0.0),
    (1.0, 0, 1.0, 0.2),
    (1.5, 50, 0.7, 0.05),
    (1e-30, 0, 0.9, 0.0),
    (1.0, 10**9, 1e-9, 0.0),
]


class Batch:
    """Rows with the parameters above in slots of another order."""

    def __init__(self, logits: torch.Tensor, seed: int = 0) -> None:
        device, num_rows = logits.device, logits.shape[0]
        self.logits = logits
        self.slots = torch.arange(num_rows, device=device).flip(0) + 1
        self.positions = torch.arange(num_rows, device=device) * 7
        rows = [PARAMETERS[row % len(PARAMETERS)] for row in range(num_rows)]
        self.floats = torch.zeros(num_rows + 1, 6, dtype=torch.float64, device=device)
        self.integers = torch.zeros(num_rows + 1, 5, dtype=torch.int64, device=device)
        keys = [stream_key(seed + row, row % 3) for row in range(num_rows)]
        for column, values in ((0, 0), (1, 2), (2, 3)):
            self.floats[self.slots, column] = torch.tensor([row[values] for row in rows], dtype=torch.float64).to(
                device
            )
        self.integers[self.slots, 0] = torch.tensor(keys).to(device)
        self.integers[self.slots, 3] = torch.tensor([row[1] for row in rows]).to(device)

    def sampled(self) -> torch.Tensor:
        columns = SlotColumns(
            temperature=self.floats[:, 0],
            top_k=self.integers[:, 3],
            top_p=self.floats[:, 1],
            min_p=self.floats[:, 2],
            stream_key=self.integers[:, 0],
        )
        return sample_tokens(self.logits, self.logits.float().argmax(-1), self.slots, self.positions, columns)

    def expected(self) -> torch.Tensor:
        """By the steps."""
        logits, slots = self.logits.float(), self.slots
        temperature, top_p, min_p = (self.floats[slots, column] for column in range(3))
        is_greedy = temperature == 0
        cut = steps.temperature(logits, temperature.masked_fill(is_greedy, 1.0).float())
        top_k = self.integers[slots, 3].clamp(max=logits.shape[1])
        cut = steps.min_p(steps.top_p(steps.top_k(cut, top_k, logits.shape[1]), top_p), min_p)
        self.cut = cut
        return torch.where(is_greedy, logits.argmax(-1), draw(cut, uniforms(self.integers[slots, 0], self.positions)))


def make_logits(num_rows: int, vocab_size: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, vocab_size, generator=generator) * 3).to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_the_steps(dtype: torch.dtype, device: str) -> None:
    num_rows, vocab_size = (300, 128256) if device == "cuda" else (len(PARAMETERS), 700)
    num_same = num_seen = 0
    for seed in range(3):
        batch = Batch(make_logits(num_rows, vocab_size, dtype, device, seed), seed)
        expected, found = batch.expected(), batch.sampled()
        num_same += int((expected == found).sum())
        num_seen += num_rows
        # An exponential may differ in its last bit, and a draw fall to the neighbour, but to no token that was cut.
        kept = batch.cut.gather(1, found[:, None]).squeeze(1) > -torch.inf
        assert (kept | (batch.floats[batch.slots, 0] == 0)).all()
    assert num_same >= 0.99 * num_seen


def test_supports_are_those_of_the_steps(device: str) -> None:
    """A few tokens whose probabilities are apart: all that are kept are drawn, and as often as they should be."""
    num_rows, vocab_size = (4000, 40) if device == "cuda" else (16, 12)
    logits = make_logits(1, vocab_size, torch.float32, device).expand(num_rows, -1).contiguous()
    for parameters in ((1.0, 6, 1.0, 0.0), (1.2, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.1), (1.0, 8, 0.9, 0.02)):
        batch = Batch(logits)
        for column, value in zip((0, 1, 2), (parameters[0], parameters[2], parameters[3]), strict=True):
            batch.floats[:, column] = value
        batch.integers[:, 3] = parameters[1]
        batch.expected()
        found = batch.sampled()
        support = batch.cut[0] > -torch.inf
        assert support[found].all()
        likely = torch.softmax(batch.cut[0], -1) > 20 / num_rows  # to be missed by all rows: once in 10^8 times
        assert torch.isin(likely.nonzero().flatten(), found).all()


@pytest.mark.gpu
def test_drawn_tokens_have_the_right_frequencies() -> None:
    """Counts are within six standard deviations of what the exact weights say, for every token."""
    num_rows = 100_000
    logits = make_logits(1, 500, torch.bfloat16, "cuda").expand(num_rows, -1).contiguous()
    batch = Batch(logits)
    batch.floats[:, 0], batch.floats[:, 1], batch.floats[:, 2], batch.integers[:, 3] = 1.1, 0.97, 0.001, 200
    batch.expected()
    weights = integer_weights(batch.cut[:1])[1][0].double()
    expected = weights / weights.sum() * num_rows
    observed = torch.bincount(batch.sampled(), minlength=500).double()
    assert not observed[weights == 0].any()
    assert ((observed - expected).abs() <= 6 * expected.sqrt() + 6).all()


def test_uniform_numbers_are_those_of_the_steps(device: str) -> None:
    """Logits that are all alike: the token is the random number in units of the vocabulary."""
    num_rows, vocab_size = 16, 1000
    batch = Batch(torch.zeros(num_rows, vocab_size, device=device))
    batch.floats[:, 0], batch.floats[:, 1], batch.floats[:, 2], batch.integers[:, 3] = 1.0, 1.0, 0.0, 0
    expected = (uniforms(batch.integers[batch.slots, 0], batch.positions) * vocab_size).long()
    assert torch.equal(batch.sampled(), expected)


@pytest.mark.gpu
def test_rows_that_are_no_numbers_disturb_nobody() -> None:
    logits = make_logits(len(PARAMETERS), 100, torch.float32, "cuda")
    expected = Batch(logits).sampled()
    spoiled = logits.clone()
    spoiled[3] = torch.nan
    spoiled[5, 7] = torch.inf
    spoiled[6] = -torch.inf
    found = Batch(spoiled).sampled()
    others = [row for row in range(len(PARAMETERS)) if row not in (3, 5, 6)]
    assert torch.equal(found[others], expected[others])
    assert ((found >= 0) & (found < 100)).all()
