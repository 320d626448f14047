"""Mixtures of experts as native ops: routing and products against definitions in float64, for every weight format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.native_ops import nans, pool, run_ops
from tests.support.packed_linear import file_blocks
from tokenmill.checkpoints.row_formats import CAN_ENCODE, decode_rows, encode_rows
from tokenmill.errors import InvalidParameterError
from tokenmill.ops.cpu.expert_lists import ExpertLists, choose_experts, list_experts, padded_pairs
from tokenmill.ops.cpu.layout import panel_width
from tokenmill.ops.cpu.threads import OpList
from tokenmill.program.program import Buffer, Operand, Operation, Program, Weight
from tokenmill.runtime.cpu_memory import ProgramMemory
from tokenmill.runtime.cpu_operations import OpWriter, StepPlaces
from tokenmill.runtime.cpu_weights import CpuWeights
from tokenmill.runtime.step_arrays import StepArrays

pytestmark = pytest.mark.spec("E2")

MAX_TOKENS = 300
FORMATS = (*CAN_ENCODE, "q2_k", "q4_k", "q6_k")


# ---- who goes where --------------------------------------------------------------------------------------------------


@dataclass
class Lists:
    """What the first two ops write."""

    experts: torch.Tensor
    shares: torch.Tensor
    entries: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor


def run_lists(logits: torch.Tensor, top_k: int, *, normalize: bool, num_threads: int = 1) -> Lists:
    num_tokens, num_experts = logits.shape
    memory = torch.full((ExpertLists.num_bytes(num_experts, top_k, num_tokens) // 4,), -7, dtype=torch.int32)
    lists = ExpertLists(memory.data_ptr(), num_experts, top_k, num_tokens)
    arguments = lists.arguments((logits.data_ptr(), logits.stride(0) * 4), normalize=normalize)
    run_ops([(choose_experts, arguments), (list_experts, arguments)], num_tokens, num_threads)
    first = (lists.part(0) - memory.data_ptr()) // 4
    parts = memory[first:].clone().view(4, num_tokens * top_k)
    entries = memory[8:first].clone().view(torch.int64).view(num_experts, 4)
    experts, shares = (part.view(num_tokens, top_k) for part in (parts[0], parts[1].view(torch.float32)))
    return Lists(experts, shares, entries, parts[2], parts[3])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 2), (7, 7), (128, 8), (60, 17)])
def test_shares_are_those_of_the_softmax(num_experts: int, top_k: int, normalize: bool) -> None:
    logits = torch.randn(23, num_experts, generator=torch.Generator().manual_seed(1)) * 3
    shares, experts = logits.double().softmax(1).topk(top_k, 1)
    if normalize:
        shares = shares / shares.sum(1, keepdim=True)
    for num_threads in (1, 3):
        found = run_lists(logits, top_k, normalize=normalize, num_threads=num_threads)
        assert torch.equal(found.experts.long(), experts)
        torch.testing.assert_close(found.shares.double(), shares, rtol=2e-6, atol=1e-9)


def test_equal_logits_choose_the_first_experts() -> None:
    found = run_lists(torch.zeros(2, 5), 3, normalize=True)
    assert found.experts.tolist() == [[0, 1, 2]] * 2
    assert torch.allclose(found.shares, torch.tensor(1 / 3))


def test_what_is_not_a_number_chooses_experts_that_exist() -> None:
    logits = torch.full((3, 6), torch.nan)
    logits[1, 2], logits[2, 5] = 1.0, torch.inf
    found = run_lists(logits, 2, normalize=True)
    assert ((found.experts >= 0) & (found.experts < 6)).all()
    assert found.shares.isnan().any(1).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_rows_are_sorted_by_expert_and_token(num_tokens: int, num_experts: int, data: Any) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(num_tokens)) ** 3
    found = run_lists(logits, top_k, normalize=True)
    pairs = sorted((expert, token) for token, row in enumerate(found.experts.tolist()) for expert in row)
    assert found.tokens.tolist() == [token for _, token in pairs]
    of_pairs = found.rows.view(num_tokens, top_k).tolist()
    assert [[pairs[row] for row in rows] for rows in of_pairs] == [
        [(expert, token) for expert in experts] for token, experts in enumerate(found.experts.tolist())
    ]
    counts = torch.bincount(found.experts.flatten(), minlength=num_experts).tolist()
    padded = [-(-count // panel_width(count)) * panel_width(count) if count else 0 for count in counts]
    assert found.entries[:, 0].tolist() == counts
    assert found.entries[:, 2].tolist() == [sum(padded[:expert]) for expert in range(num_experts)]
    assert found.entries[:, 3].tolist() == [sum(counts[:expert]) for expert in range(num_experts)]
    assert sum(padded) <= padded_pairs(num_tokens * top_k, num_experts)


@given(st.lists(st.integers(0, 70), min_size=1, max_size=12))
def test_padding_is_bounded_for_every_way_to_share_rows(counts: list[int]) -> None:
    padded = [-(-count // panel_width(count)) * panel_width(count) if count else 0 for count in counts]
    assert sum(padded) <= padded_pairs(sum(counts), len(counts))


def test_more_experts_than_there_are_is_an_error() -> None:
    with pytest.raises(InvalidParameterError, match="3 of 2 experts"):
        ExpertLists(0, 2, 3, 1).arguments((0, 0), normalize=True)


# ---- the whole operation ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Experts with random weights: encoded rows, and their values in float64."""

    sizes: tuple[int, int, int, int]
    formats: tuple[str, str]
    encoded: dict[str, npt.NDArray[np.uint8]]
    values: dict[str, npt.NDArray[np.float64]]
    activation: str = "silu"
    normalize: bool = True

    def expected(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """One token and expert after the other."""
        num_experts, top_k = self.sizes[:2]
        gate_up, down = (np.split(self.values[role], num_experts) for role in ("gate_up", "down"))
        shares, experts = logits.double().softmax(1).topk(top_k, 1)
        if self.normalize:
            shares = shares / shares.sum(1, keepdim=True)
        result = torch.zeros(x.shape, dtype=torch.float64)
        for token, row in enumerate(x.double()):
            for share, expert in zip(shares[token], experts[token].tolist(), strict=True):
                gate, up = (torch.from_numpy(gate_up[expert]) @ row).chunk(2)
                result[token] += share * (torch.from_numpy(down[expert]) @ (activated(self.activation, gate) * up))
        return result


def activated(name: str, gate: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) if name == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")


def mixture(
    formats: tuple[str, str], num_experts: int = 6, top_k: int = 3, hidden: int = 256, features: int = 256, **rest: Any
) -> Mixture:
    encoded, values = {}, {}
    shapes = {"gate_up": (num_experts * 2 * features, hidden), "down": (num_experts * hidden, features)}
    for (role, shape), one in zip(shapes.items(), formats, strict=True):
        if one in CAN_ENCODE:
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(role))) * shape[1] ** -0.5
            rows = encode_rows(weight, one)
            encoded[role], values[role] = rows, decode_rows(rows, one, shape[1]).double().numpy()
        else:
            encoded[role], values[role] = file_blocks(one, *shape)
            values[role] = values[role].astype(np.float64)
    return Mixture((num_experts, top_k, hidden, features), formats, encoded, values, **rest)


def program_of(one: Mixture) -> Program:
    num_experts, top_k, hidden, _ = one.sizes
    buffers = (Buffer("x", "tokens", hidden), Buffer("logits", "tokens", num_experts), Buffer("y", "tokens", hidden))
    weights = tuple(
        Weight(role, one.values[role].shape, encoding)
        for role, encoding in zip(("gate_up", "down"), one.formats, strict=True)
    )
    inputs = {"x": Operand("x", 0, hidden), "router_logits": Operand("logits", 0, num_experts)}
    attributes = {"num_experts": num_experts, "top_k": top_k}
    attributes |= {"normalize": one.normalize, "activation": one.activation}  # type: ignore[dict-item]
    roles = {"gate_up": "gate_up", "down": "down"}
    operation = Operation("experts", "experts", inputs, {"y": Operand("y", 0, hidden)}, roles, attributes)
    return Program((), Buffer("output", "rows", 1), buffers, weights, (operation,))


class Run:
    """The operation in the memory of an executor."""

    def __init__(self, one: Mixture, num_threads: int = 1) -> None:
        program, self.num_threads = program_of(one), num_threads
        arrays = StepArrays(
            max_num_tokens=MAX_TOKENS, max_batch_size=4, max_num_rows=16, max_seq_len=64, tokens_per_block=16
        )
        self.memory = ProgramMemory(program, arrays, ["x", "logits", "y"])
        contents = {name: rows.reshape(-1) for name, rows in one.encoded.items()}
        weights = CpuWeights(program, contents, self.memory)
        self._places = StepPlaces(arrays, 0, (), (), num_threads)
        entries = OpWriter(self.memory, weights, self._places).write(program.operations[0], one=False)
        self.ops = OpList(len(entries))
        for op in entries:
            op.append_to(self.ops)

    def __call__(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        num_tokens = len(x)
        for name, tensor in (("x", x), ("logits", logits), ("y", nans(*x.shape))):
            self.memory.floats(name, num_tokens)[:] = tensor.numpy()
        self.ops.rows[: self.ops.num_ops, 1] = num_tokens
        pool(self.num_threads).run(self.ops)
        return torch.from_numpy(self.memory.floats("y", num_tokens).copy())


def inputs_of(one: Mixture, num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits; the first expert is nobody's, and a few have most tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, one.sizes[0], generator=generator) * 2
    logits[:, 0] -= 20.0
    logits[:, -1] += 2.0
    return torch.randn(num_tokens, one.sizes[2], generator=generator), logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.spec("E4")
@pytest.mark.parametrize("weight_format", FORMATS)
def test_every_format(weight_format: str) -> None:
    one = mixture((weight_format, weight_format))
    run = Run(one)
    for num_tokens in (1, 2, 37):
        x, logits = inputs_of(one, num_tokens)
        error = relative_error(run(x, logits), one.expected(x, logits))
        is_float = weight_format in ("float32", "bfloat16")
        assert error < (2e-6 if is_float else 0.02)
        assert is_float or error > 1e-4, "the activations were not rounded"


@pytest.mark.parametrize("formats", [("q4_k", "q6_k"), ("float32", "q8_0"), ("q4_0", "bfloat16")])
def test_the_projections_may_have_different_formats(formats: tuple[str, str]) -> None:
    one = mixture(formats, activation="gelu_pytorch_tanh", normalize=False)
    x, logits = inputs_of(one, 21)
    assert relative_error(Run(one)(x, logits), one.expected(x, logits)) < 0.02


@pytest.mark.parametrize("weight_format", ["float32", "int8_group32", "int8_channel"])
def test_sizes_need_not_fill_blocks(weight_format: str) -> None:
    one = mixture((weight_format, weight_format), 5, 2, 48, 80)
    run = Run(one)
    for num_tokens in (1, 9):
        x, logits = inputs_of(one, num_tokens)
        assert relative_error(run(x, logits), one.expected(x, logits)) < 0.02


@pytest.mark.parametrize("weight_format", ["float32", "q4_1", "int8_channel"])
def test_a_token_gets_the_same_bits_in_any_batch_and_with_any_number_of_threads(weight_format: str) -> None:
    one = mixture((weight_format, weight_format), 6, 3, 96, 160)
    x, logits = inputs_of(one, MAX_TOKENS)
    runs = [Run(one, num_threads) for num_threads in (1, 2, 3)]
    whole = runs[0](x, logits)
    for run in runs[1:]:
        assert torch.equal(run(x, logits), whole)
    for first, end in ((0, 1), (1, 2), (5, 8), (17, 50), (100, 137), (299, 300)):
        for run in runs:
            assert torch.equal(run(x[first:end], logits[first:end]), whole[first:end]), (first, end)


def test_one_expert_may_have_all_tokens() -> None:
    one = mixture(("q8_0", "q8_0"), 4, 1, 64, 96)
    x, logits = inputs_of(one, MAX_TOKENS)
    logits[:, 2] = 50.0
    assert relative_error(Run(one, 2)(x, logits), one.expected(x, logits)) < 0.02
