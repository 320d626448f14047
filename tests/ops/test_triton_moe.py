"""Kernels of mixture of experts against the definition: interpreted with tiny shapes, and compiled with real ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tests.support.expert_weights import WeightKind, quantized_matrix, random_experts, random_routing
from tests.support.triton_kernels import relative_error
from tokenmill.ops.fp8 import QuantizedRows, per_token_quantize_reference, static_quantize_reference
from tokenmill.ops.moe import (
    ExpertMatrix,
    quantize_groups_fp8,
    route_reference,
    run_experts_reference,
    run_experts_torch,
)
from tokenmill.ops.moe_plan import GroupedPlan, PairPlan, down_pair_plan, gate_up_pair_plan, grouped_plan
from tokenmill.ops.platform import is_hopper

pytest.importorskip("triton")
from tokenmill.ops.triton.moe_layer import programs_stay, tile_products
from tokenmill.ops.triton.moe_pairs import run_pairs
from tokenmill.ops.triton.moe_routing import combine, route
from tokenmill.ops.triton.moe_scales import quantize_groups
from tokenmill.ops.triton.moe_sorting import RowBlocks, sort_many_pairs, sort_pairs
from tokenmill.ops.triton.moe_tiles import block_scaled_product, grouped_down, grouped_gate_up

pytestmark = pytest.mark.usefixtures("poisoned")
BF16 = torch.bfloat16
PAIR_PLANS = PairPlan(64, 128, 4), PairPlan(32, 64, 4)
TINY_PLAN = GroupedPlan(16, 4, 2, 128, 64, 4, 2)
Sort = Callable[[torch.Tensor, int, int, int], RowBlocks]
KINDS: tuple[WeightKind, ...] = ("plain", "features", "blocks")
TOLERANCE = {"plain": 1e-2, "features": 1.5e-2, "blocks": 1.5e-2}
"""Rounding to bfloat16, and single steps of float8 where sums differ in the last place."""


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 4, 2), (5, 6, 3), (3, 128, 8), (0, 4, 2)])
def test_route(num_tokens: int, num_experts: int, top_k: int, normalize: bool, device: str) -> None:
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0)).to(device)
    experts, weights = route(logits, top_k, normalize)
    expected = route_reference(logits, top_k, normalize)
    assert torch.equal(experts, expected.experts)
    torch.testing.assert_close(weights, expected.weights, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_routes_of_broken_logits_stay_within_the_experts(device: str) -> None:
    """Five experts in a block of eight: what is no number must not name one of the three that are not there."""
    logits = torch.full((2, 5), float("nan"), device=device)
    experts, _ = route(logits, 3, normalize=True)
    assert bool(((experts >= 0) & (experts < 5)).all())


@pytest.mark.parametrize("sort", [sort_pairs, sort_many_pairs])
@pytest.mark.parametrize(("first_expert", "num_experts"), [(0, 7), (2, 3)])
@pytest.mark.parametrize("num_tokens", [1, 50, 2500])
def test_sorted_pairs(num_tokens: int, first_expert: int, num_experts: int, sort: Sort, device: str) -> None:
    routing = random_routing(num_tokens, 7, 2, device)
    blocks = sort(routing.experts, first_expert, num_experts, 4)
    flat = routing.experts.flatten().tolist()
    expected_tiles, expected_experts = [], []
    for expert in range(first_expert, first_expert + num_experts):
        pairs = [pair for pair, chosen in enumerate(flat) if chosen == expert]
        for start in range(0, len(pairs), 4):
            tile = pairs[start : start + 4]
            expected_tiles.append(tile + [len(flat)] * (4 - len(tile)))
            expected_experts.append(expert - first_expert)
    is_used = blocks.experts >= 0
    assert blocks.pairs.view(-1, 4)[is_used].tolist() == expected_tiles
    assert blocks.experts[is_used].tolist() == expected_experts
    assert blocks.experts[~is_used].eq(-1).all()
    if blocks.num_used is not None:
        assert int(blocks.num_used) == len(expected_tiles)
        assert is_used[: len(expected_tiles)].all()


def test_combine_skips_other_ranks(device: str) -> None:
    of_pairs = torch.arange(24, dtype=torch.float32, device=device).view(6, 4)
    of_pairs[2:4] = float("nan")  # nobody wrote them
    experts = torch.tensor([[1, 2], [0, 3], [2, 1]], dtype=torch.int32, device=device)
    total = combine(of_pairs, experts, first_expert=1, num_experts=2)
    expected = torch.stack([of_pairs[0] + of_pairs[1], torch.zeros(4, device=device), of_pairs[4] + of_pairs[5]])
    assert torch.equal(total, expected)


@pytest.mark.parametrize("size", [1, 128, 300])
def test_quantize_groups(size: int, device: str) -> None:
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    values, scales = quantize_groups(x.to(device))
    expected = quantize_groups_fp8(x)
    torch.testing.assert_close(scales.cpu(), expected.scales)
    # The interpreter loses a carry now and then: `test_triton_rows.check_quantized`.
    assert relative_error(values.float().cpu(), expected.values.float()) < (1e-6 if device == "cuda" else 0.2)
    if device == "cpu":
        assert float((values.float() == expected.values.float()).float().mean()) > 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_pairs(num_tokens: int, kind: WeightKind, device: str) -> None:
    weights = random_experts(4, 136, 256, BF16, kind, device)
    x = torch.randn(num_tokens, 139, generator=torch.Generator().manual_seed(3)).to(device, BF16)[:, :136]
    routing = random_routing(num_tokens, 4, 2, device)
    assert (
        relative_error(run_pairs(x, routing, weights, *PAIR_PLANS), run_experts_reference(x, routing, weights)) < 1e-2
    )


@pytest.mark.spec("E2")
@pytest.mark.parametrize(("num_tokens", "hidden"), [(5, 40), (20, 160)])
def test_tiles(num_tokens: int, hidden: int, device: str) -> None:
    weights = random_experts(4, hidden, 128, BF16, "plain", device)
    x = torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(3)).to(device, BF16)
    routing = random_routing(num_tokens, 4, 2, device)
    actual = tile_products(x, routing, weights, TINY_PLAN).total()
    assert relative_error(actual, run_experts_reference(x, routing, weights)) < TOLERANCE["plain"]


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_float32_is_exact(num_tokens: int, device: str) -> None:
    """Programs of built engines may compute in float32, inside graphs: the host must not be asked."""
    weights = random_experts(4, 160, 128, torch.float32, "plain", device)
    x = torch.randn(num_tokens, 160, generator=torch.Generator().manual_seed(3)).to(device)
    routing = random_routing(num_tokens, 4, 2, device)
    expected = run_experts_reference(x, routing, weights)
    assert relative_error(tile_products(x, routing, weights, TINY_PLAN).total(), expected) < 1e-5
    assert relative_error(run_pairs(x, routing, weights, *PAIR_PLANS), expected) < 1e-5


@pytest.mark.parametrize("kind", ["features", "blocks"])
def test_tiles_of_float8(kind: WeightKind, device: str) -> None:
    """Product by product, since the interpreter rounds to float8 badly (`test_triton_rows.check_quantized`)."""
    weights = random_experts(4, 160, 256, BF16, kind, device)
    routing = random_routing(9, 4, 2, device)
    blocks = sort_pairs(routing.experts, 0, 4, 16)
    x = torch.randn(9, 160, generator=torch.Generator().manual_seed(3))
    rows = quantize_groups_fp8(x) if kind == "blocks" else per_token_quantize_reference(x)
    exact_x = dequantized(rows).to(device)
    exact_inner = torch.empty(18, 256, dtype=torch.float64, device=device)
    exact = torch.empty(18, 160, dtype=torch.float64, device=device)
    for pair, expert in enumerate(routing.experts.flatten().tolist()):
        gate, up = (weights.gate_up.dequantized(expert, torch.float32).double() @ exact_x[pair // 2]).chunk(2)
        exact_inner[pair] = gate * gate.sigmoid() * up
    inner = grouped_gate_up(*(part.to(device) for part in rows), routing, weights, blocks, TINY_PLAN)
    assert isinstance(inner, QuantizedRows)
    expected = quantize_groups_fp8(exact_inner.float().cpu())
    torch.testing.assert_close(inner.scales.cpu(), expected.scales, rtol=1e-3, atol=0.0)
    assert relative_error(dequantized(inner), exact_inner) < (0.035 if device == "cuda" else 0.2)
    given = QuantizedRows(*(part.to(device) for part in expected))
    for pair, expert in enumerate(routing.experts.flatten().tolist()):
        matrix = weights.down.dequantized(expert, torch.float32).double()
        exact[pair] = matrix @ dequantized(given)[pair] * routing.weights.flatten()[pair]
    assert relative_error(grouped_down(given, routing, weights, blocks, TINY_PLAN, BF16), exact) < 6e-3


def test_rows_with_one_scale_each(device: str) -> None:
    """As many tokens are multiplied: the first product stays in bfloat16, the second takes one scale a row."""
    weights = random_experts(4, 160, 256, BF16, "features", device)
    routing = random_routing(9, 4, 2, device)
    blocks = sort_pairs(routing.experts, 0, 4, 16)
    rows = per_token_quantize_reference(torch.randn(9, 160, generator=torch.Generator().manual_seed(3)))
    operands = [part.to(device) for part in rows]
    inner = grouped_gate_up(operands[0], operands[1], routing, weights, blocks, TINY_PLAN, unquantized=BF16)
    assert isinstance(inner, torch.Tensor)
    given = QuantizedRows(*(part.to(device) for part in per_token_quantize_reference(inner.cpu())))
    out = grouped_down(given, routing, weights, blocks, TINY_PLAN, BF16)
    for pair, expert in enumerate(routing.experts.flatten().tolist()):
        token = dequantized(rows)[pair // 2].to(device)
        gate, up = (weights.gate_up.dequantized(expert, torch.float32).double() @ token).chunk(2)
        assert relative_error(inner[pair], gate * gate.sigmoid() * up) < 6e-3
        exact = weights.down.dequantized(expert, torch.float32).double() @ dequantized(given)[pair]
        assert relative_error(out[pair], exact * routing.weights.flatten()[pair]) < 6e-3


def test_static_scales_of_inputs(device: str) -> None:
    """Both products take one scale for all rows, which the checkpoint gave."""
    scales = torch.tensor([0.02], device=device), torch.tensor([0.03], device=device)
    weights = dataclasses.replace(random_experts(4, 160, 256, BF16, "features", device), input_scales=scales)
    routing = random_routing(9, 4, 2, device)
    x = torch.randn(9, 160, generator=torch.Generator().manual_seed(3)).to(device, BF16)
    exact = torch.zeros(9, 160, dtype=torch.float64, device=device)
    for pair, expert in enumerate(routing.experts.flatten().tolist()):
        row = dequantized(static_quantize_reference(x[pair // 2 : pair // 2 + 1], scales[0]))[0]
        gate, up = (weights.gate_up.dequantized(expert, torch.float32).double() @ row).chunk(2)
        inner = dequantized(static_quantize_reference((gate * gate.sigmoid() * up).bfloat16()[None], scales[1]))[0]
        matrix = weights.down.dequantized(expert, torch.float32).double()
        exact[pair // 2] += matrix @ inner * routing.weights.flatten()[pair]
    # The interpreter rounds to float8 badly: `test_triton_rows.check_quantized`.
    assert relative_error(tile_products(x, routing, weights, TINY_PLAN).total(), exact) < (
        0.02 if device == "cuda" else 0.2
    )


def dequantized(rows: QuantizedRows) -> torch.Tensor:
    """[T, D] float64, of rows with a scale each or several."""
    scales = rows.scales if rows.scales.dim() == 2 else rows.scales[:, None]
    width = 128 if rows.scales.dim() == 2 else rows.values.shape[1]
    return rows.values.double() * scales.repeat_interleave(width, 1)[:, : rows.values.shape[1]]


def test_features_that_fill_no_block(device: str) -> None:
    weights = random_experts(3, 72, 100, BF16, "plain", device, activation="gelu_pytorch_tanh")
    x = torch.randn(6, 72, generator=torch.Generator().manual_seed(3)).to(device, BF16)
    routing = random_routing(6, 3, 2, device)
    expected = run_experts_reference(x, routing, weights)
    assert relative_error(tile_products(x, routing, weights, TINY_PLAN).total(), expected) < 1.5e-2
    assert relative_error(run_pairs(x, routing, weights, *PAIR_PLANS), expected) < 1.5e-2


@pytest.mark.parametrize("num_tokens", [2, 9])
def test_a_rank_adds_its_own_experts_only(num_tokens: int, device: str) -> None:
    weights = random_experts(6, 40, 128, BF16, device=device)
    part = dataclasses.replace(
        weights,
        gate_up=ExpertMatrix(weights.gate_up.values[2:4].contiguous()),
        down=ExpertMatrix(weights.down.values[2:4].contiguous()),
        first_expert=2,
    )
    x = torch.randn(num_tokens, 40, generator=torch.Generator().manual_seed(3)).to(device, BF16)
    routing = random_routing(num_tokens, 6, 4, device)
    expected = run_experts_reference(x, routing, part)
    assert float(expected.float().norm()) > 0
    assert relative_error(run_pairs(x, routing, part, *PAIR_PLANS), expected) < 1e-2
    assert relative_error(tile_products(x, routing, part, TINY_PLAN).total(), expected) < 1e-2


@pytest.mark.parametrize("num_rows", [0, 3, 17])
@pytest.mark.parametrize("shape", [(64, 128), (200, 300)])
def test_block_scaled_product(num_rows: int, shape: tuple[int, int], device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = quantized_matrix(torch.randn(1, *shape, generator=generator).to(device) * 0.1, BF16, "blocks")
    bias = torch.randn(shape[0], generator=generator).to(device, BF16)
    rows = quantize_groups_fp8(torch.randn(num_rows, shape[1], generator=generator).to(device, BF16))
    factors = rows.scales.repeat_interleave(128, 1)[:, : shape[1]]
    expected = (rows.values.double() * factors) @ weight.dequantized(0, torch.float32).double().T + bias.double()
    assert relative_error(block_scaled_product(rows, weight, bias, BF16), expected) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 5, 16, 64, 200, 256, 1000])
def test_real_shapes(num_tokens: int, kind: WeightKind) -> None:
    """The grouped way in torch is the reference: it was tested against the definition on the CPU."""
    weights = random_experts(32, 2048, 768, BF16, kind, "cuda")
    x = torch.randn(num_tokens, 2048, generator=torch.Generator().manual_seed(3)).to("cuda", BF16)
    routing = random_routing(num_tokens, 32, 8, "cuda")
    expected = run_experts_torch(x, routing, weights)
    run = lambda: run_pairs(x, routing, weights, gate_up_pair_plan(768, 2048), down_pair_plan(2048, 768))  # noqa: E731
    if num_tokens > 4:
        run = lambda: tile_products(x, routing, weights, grouped_plan(8 * num_tokens, 32)).total()  # noqa: E731
    actual = run()
    assert relative_error(actual, expected) < TOLERANCE[kind]
    assert torch.equal(run(), actual)


@pytest.mark.gpu
@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("shape", [(512, 384), (768, 640), (768, 1024), (1024, 768)])
def test_products_that_stay(shape: tuple[int, int], is_static: bool) -> None:
    """Fewest blocks to look ahead over, several tiles an expert, and a rank with an expert that nobody chose."""
    weights = random_experts(7, *shape, BF16, "features", "cuda")
    if is_static:
        scales = torch.tensor([0.02], device="cuda"), torch.tensor([0.03], device="cuda")
        weights = dataclasses.replace(weights, input_scales=scales)
    gate_up, down = (
        ExpertMatrix(matrix.values[1:6].contiguous(), matrix.scales[1:6].contiguous())
        for matrix in (weights.gate_up, weights.down)
        if matrix.scales is not None
    )
    part = dataclasses.replace(weights, gate_up=gate_up, down=down, first_expert=1)
    x = torch.randn(700, shape[0], generator=torch.Generator().manual_seed(3)).to("cuda", BF16)
    routing = random_routing(700, 6, 3, "cuda")
    routing.experts[routing.experts == 4] = 6
    plan = grouped_plan(routing.experts.numel(), 5)
    assert programs_stay(x, part, plan, routing.experts.numel()) == is_hopper(x.device)
    actual = tile_products(x, routing, part, plan).total()
    assert relative_error(actual, run_experts_torch(x, routing, part)) < TOLERANCE["features"]
    assert torch.equal(tile_products(x, routing, part, plan).total(), actual)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 64, 600])
def test_a_graph_follows_the_routing(num_tokens: int) -> None:
    """Captured with one routing, replayed with another."""
    weights = random_experts(16, 512, 256, BF16, "features", "cuda")
    x = torch.randn(num_tokens, 512, device="cuda", dtype=BF16)
    logits = torch.randn(num_tokens, 16, device="cuda")

    def run() -> torch.Tensor:
        from tokenmill.ops.moe import route as choose_experts
        from tokenmill.ops.moe import run_experts

        return run_experts(x, choose_experts(logits.bfloat16(), 4, normalize=True), weights)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(3):
        logits.copy_(torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(seed)))
        x.normal_()
        expected = run()
        graph.replay()
        assert torch.equal(captured, expected)
