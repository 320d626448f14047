"""Mixture of experts on the CPU: the grouped way against the definition, which goes token by token."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from tests.support.expert_weights import WeightKind, random_experts, random_routing
from tests.support.triton_kernels import TOLERANCES, relative_error
from tokenmill.ops.fp8 import per_token_quantize_fp8
from tokenmill.ops.linear import PackedWeight
from tokenmill.ops.moe import (
    ExpertMatrix,
    ExpertWeights,
    Routing,
    quantize_groups_fp8,
    route,
    run_experts,
    run_experts_reference,
)
from tokenmill.ops.moe_plan import (
    GROUPED_PLANS,
    MANY_ROWS,
    MANY_STAGES,
    down_pair_plan,
    fits_many,
    gate_up_pair_plan,
    grouped_plan,
    max_row_blocks,
)


def by_hand(x: torch.Tensor, routing: Routing, weights: ExpertWeights) -> torch.Tensor:
    """What transformers computes, in float64, one expert after the other over all tokens."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(weights.num_experts):
        gate_up = weights.gate_up.dequantized(expert, torch.float32).double()
        gate, up = (x.double() @ gate_up.T).chunk(2, dim=-1)
        result = (gate * torch.sigmoid(gate) * up) @ weights.down.dequantized(expert, torch.float32).double().T
        share = (routing.weights * (routing.experts == expert)).sum(dim=1).double()
        out += share[:, None] * result
    return out


@pytest.mark.parametrize("normalize", [False, True])
def test_routing(normalize: bool) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, -1.0, 4.0, 0.0]])
    routing = route(logits, 2, normalize=normalize)
    assert routing.experts.tolist() == [[1, 3], [0, 2]]
    assert routing.experts.dtype == torch.int32
    probabilities = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    expected = probabilities.gather(1, routing.experts.long())
    if normalize:
        expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.spec("E2")
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepared", [False, True])
def test_unquantized_experts(num_tokens: int, dtype: torch.dtype, prepared: bool) -> None:
    weights = random_experts(6, 40, 24, dtype)
    x = torch.randn(num_tokens, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    routing = random_routing(num_tokens, 6, 3)
    expected = by_hand(x, routing, weights)
    assert relative_error(run_experts_reference(x, routing, weights), expected) < TOLERANCES[dtype]
    actual = run_experts(x, routing, weights.prepared() if prepared else weights)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < TOLERANCES[dtype]


def test_prepared_experts_hold_their_weights_once() -> None:
    prepared = random_experts(3, 40, 24, torch.float32).prepared()
    assert prepared.packed is not None
    assert all(isinstance(matrix, PackedWeight) for matrix in prepared.packed[0])
    assert prepared.gate_up.values.numel() == prepared.down.values.numel() == 0
    assert prepared.num_experts == 3


@pytest.mark.parametrize("kind", ["features", "blocks"])
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 12, 120])
def test_float8_experts(kind: WeightKind, num_tokens: int) -> None:
    """Equal to the definition up to single steps of float8, and near the product without quantized activations."""
    weights = random_experts(4, 160, 256, torch.float32, kind)
    x = torch.randn(num_tokens, 160, generator=torch.Generator().manual_seed(2))
    routing = random_routing(num_tokens, 4, 2)
    actual = run_experts(x, routing, weights)
    assert relative_error(actual, run_experts_reference(x, routing, weights)) < 5e-3
    error = relative_error(actual, by_hand(x, routing, weights))
    assert error < 1e-5 if num_tokens <= 4 else 1e-5 < error < 0.06


def test_static_scales_of_inputs() -> None:
    """Every step in plain torch: x and what is between the projections are rounded to multiples of the given scales."""
    of_x, of_inner = 0.004, 0.003  # x beyond 448 * 0.004 is cut off
    weights = dataclasses.replace(
        random_experts(4, 40, 24, torch.float32, "features"),
        input_scales=(torch.tensor([of_x]), torch.tensor([of_inner])),
    )
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    routing = random_routing(6, 4, 2)

    def rounded(values: torch.Tensor, scale: float) -> torch.Tensor:
        return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale

    expected = torch.zeros(6, 40, dtype=torch.float64)
    for token in range(6):
        for expert, share in zip(routing.experts[token].tolist(), routing.weights[token].tolist(), strict=True):
            gate, up = (weights.gate_up.dequantized(expert, torch.float32).double() @ rounded(x[token], of_x)).chunk(2)
            inner = rounded((gate * gate.sigmoid() * up).float(), of_inner)
            expected[token] += share * (weights.down.dequantized(expert, torch.float32).double() @ inner)
    assert relative_error(run_experts(x, routing, weights), expected) < 5e-3  # single steps of float8
    assert relative_error(run_experts_reference(x, routing, weights), expected) < 5e-3
    dynamic = dataclasses.replace(weights, input_scales=None)
    assert relative_error(run_experts(x, routing, dynamic), expected) > 0.02
    assert not weights.takes_quantized(6) and dynamic.takes_quantized(6)


def test_rows_quantized_beforehand() -> None:
    weights = random_experts(4, 160, 24, torch.float32, "features")
    x = torch.randn(6, 160, generator=torch.Generator().manual_seed(2))
    routing, quantized = random_routing(6, 4, 2), per_token_quantize_fp8(x)
    assert weights.takes_quantized(6) and not weights.takes_quantized(4)
    given = run_experts(torch.full_like(x, float("nan")), routing, weights, quantized)
    assert torch.equal(given, run_experts(x, routing, weights))


def test_a_rank_adds_its_own_experts_only() -> None:
    weights = random_experts(6, 40, 24, torch.float32)
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(2))
    routing = random_routing(9, 6, 3)
    parts = [
        dataclasses.replace(
            weights,
            gate_up=ExpertMatrix(weights.gate_up.values[first : first + 2]),
            down=ExpertMatrix(weights.down.values[first : first + 2]),
            first_expert=first,
        )
        for first in (0, 2, 4)
    ]
    for run in (run_experts, run_experts_reference):
        total = sum(run(x, routing, part) for part in parts)
        assert isinstance(total, torch.Tensor)
        assert relative_error(total, run_experts(x, routing, weights)) < 1e-6
    nobody = Routing(torch.zeros(9, 1, dtype=torch.int32), torch.ones(9, 1))
    assert not run_experts(x, nobody, parts[1]).any()


def test_gelu_experts() -> None:
    weights = random_experts(2, 16, 8, torch.float32, activation="gelu_pytorch_tanh")
    x, routing = torch.randn(5, 16), random_routing(5, 2, 1)
    silu = dataclasses.replace(weights, activation="silu")
    assert relative_error(run_experts(x, routing, weights), run_experts_reference(x, routing, weights)) < 1e-6
    assert relative_error(run_experts(x, routing, silu), run_experts(x, routing, weights)) > 1e-2


@pytest.mark.parametrize("size", [1, 128, 300])
def test_quantization_by_groups(size: int) -> None:
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    values, scales = quantize_groups_fp8(x)
    assert values.shape == x.shape and scales.shape == (3, -(-size // 128))
    for group, (part, codes) in enumerate(zip(x.split(128, 1), values.float().split(128, 1), strict=True)):
        torch.testing.assert_close(scales[:, group], part.abs().amax(1) / 448)
        assert ((codes * scales[:, group, None] - part).abs() <= part.abs() / 16 + scales[:, group, None]).all()


def test_plans() -> None:
    for num_pairs in (8, 40, 2048, 65536):
        plan = grouped_plan(num_pairs, 128)
        assert plan.block_rows >= 16 and plan.block_rows & (plan.block_rows - 1) == 0
    assert GROUPED_PLANS[-1][0] == float("inf")
    assert grouped_plan(2048, 128).block_rows < grouped_plan(65536, 128).block_rows
    assert max_row_blocks(2048, 128, 16) == 256
    assert max_row_blocks(8, 128, 16) == 128
    assert gate_up_pair_plan(768, 2048) == (4, 512, 2)
    assert down_pair_plan(2048, 768) == (4, 256, 1)
    for shape, plan_of in itertools.product(((14336, 4096), (24, 40), (1, 1)), (gate_up_pair_plan, down_pair_plan)):
        plan = plan_of(*shape)
        assert plan.block_out & (plan.block_out - 1) == 0 < plan.block_out
        assert plan.block_in & (plan.block_in - 1) == 0 < plan.block_in
        assert 1 <= plan.num_warps <= 4


@pytest.mark.parametrize("num_programs", [16, 132])
@pytest.mark.parametrize("weight_bytes", [100, 128 * 132, 2**20 + 64, 128 * 1536 * 2048])
def test_early_weights_are_those_of_the_matrix(weight_bytes: int, num_programs: int) -> None:
    plan = grouped_plan(2048, 128)
    piece = plan.early_piece(weight_bytes, 16.0, num_programs)
    assert piece % 16 == 0
    assert 0 <= piece * plan.early_pieces * num_programs <= weight_bytes
    assert piece < 2**20
    assert weight_bytes < 2**28 or piece == 32 * 1024
    assert plan.early_piece(weight_bytes, 0.5, num_programs) == 0
    assert grouped_plan(4096, 128).early_piece(weight_bytes, 32.0, num_programs) == 0


def test_products_that_stay_take_whole_blocks() -> None:
    assert fits_many(2048, 768) and fits_many(512, 384)
    assert not any(fits_many(*shape) for shape in ((2048, 700), (2176, 768), (256, 768), (2048, 256)))
    assert (3 * MANY_STAGES + 2) * MANY_ROWS * 128 <= 227 * 1024  # what a program has, with a block that it stores
