"""Products whose rows have the same bits in any company: exact in the interpreter, bit for bit on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.triton_kernels import TOLERANCES, relative_error
from tokenmill.ops.block_fp8 import BlockScaledWeight, block_scaled_linear
from tokenmill.ops.fp8 import Fp8Weight, per_token_quantize_fp8, per_token_quantize_reference, scaled_linear
from tokenmill.ops.linear import linear, pack_linear_weight
from tokenmill.ops.linear_plan import InvariantPlan, invariant_plan
from tokenmill.ops.moe import ExpertMatrix, ExpertWeights, route, run_experts

pytest.importorskip("triton")
from tokenmill.ops.triton.linear_invariant import invariant_product

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.spec("H3")]
BF16 = torch.bfloat16
NUM_ROWS = (1, 2, 16, 17, 64, 65, 128, 129, 300, 2100)
REAL_SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (4001, 4104)]


@pytest.mark.parametrize("num_rows", [1, 17, 130])
@pytest.mark.parametrize("shape", [(3, 40), (70, 200)])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_small_integers_are_multiplied_exactly(
    num_rows: int, shape: tuple[int, int], num_splits: int, device: str
) -> None:
    """Whatever the order of sums: what is left to be wrong is which numbers are summed, and where sums go."""
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randint(-3, 4, (num_rows, shape[1] + 3), generator=generator)[:, : shape[1]].to(device, BF16)
    weight = torch.randint(-3, 4, shape, generator=generator).to(device, BF16)
    bias = torch.randint(-3, 4, shape[:1], generator=generator).to(device, BF16)
    scales = torch.tensor([1.0, 2.0, 0.5], device=device).repeat(50)
    for splits_programs in (False, True):
        if splits_programs and num_splits == 1:
            continue
        plan = InvariantPlan(64, 16, 32, 4, 2, num_splits, 128 // num_splits, splits_programs, group_rows=2)
        plan = plan._replace(split_size=-(-shape[1] // (32 * num_splits)) * 32)
        actual = invariant_product(
            x, scales[:num_rows], weight, scales[: shape[0]], bias, plan, torch.float32
        )  # fmt: skip
        expected = (x.double() @ weight.double().T) * scales[:num_rows, None] * scales[: shape[0]] + bias.double()
        assert torch.equal(actual.double(), expected)


@pytest.mark.parametrize("weight_bytes", [1, 2])
@pytest.mark.parametrize("shape", [*REAL_SHAPES, (128256, 4096), (64, 64), (7, 5)])
def test_the_order_of_sums_is_the_same_for_all_numbers_of_rows(shape: tuple[int, int], weight_bytes: int) -> None:
    plans = [invariant_plan(num_rows, *shape, weight_bytes) for num_rows in NUM_ROWS]
    assert len({(plan.num_splits, plan.split_size) for plan in plans}) == 1
    for plan in plans:
        assert plan.split_size % plan.block_in == 0
        assert plan.split_size * (plan.num_splits - 1) < shape[1] <= plan.split_size * plan.num_splits
        assert plan.splits_programs <= (plan.num_splits > 1)


def check_rows(compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, expected: torch.Tensor) -> None:
    """Rows of x alone, and in batches of many sizes, have the bits that they have among all."""
    together = compute(x)
    assert relative_error(together, expected) <= TOLERANCES[BF16]
    for num_rows in NUM_ROWS:
        for first in (0, 5):
            rows = slice(first, first + num_rows)
            assert torch.equal(compute(x[rows]), together[rows]), (num_rows, first)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL_SHAPES)
@pytest.mark.parametrize("kind", ["bfloat16", "float8"])
def test_rows_have_the_same_bits_in_any_company(shape: tuple[int, int], kind: str) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(NUM_ROWS[-1], shape[1], generator=generator, device="cuda").to(BF16)
    weight = (torch.randn(shape, generator=generator, device="cuda") / shape[1] ** 0.5).to(BF16)
    if kind == "bfloat16":
        packed = pack_linear_weight(weight, batch_invariant=True)
        check_rows(lambda rows: linear(rows, packed), x, x.double() @ weight.double().T)
        return
    quantized = Fp8Weight.of(per_token_quantize_reference(weight), batch_invariant=True)
    rows = per_token_quantize_reference(x)
    values = rows.values.double() * rows.scales.double()[:, None]
    check_rows(
        lambda part: scaled_linear(per_token_quantize_fp8(part), quantized, None, BF16),
        x,
        values @ quantized.dequantized(torch.float32).double().T,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bfloat16", "float8"])
def test_experts_give_a_token_the_same_bits_in_any_company(kind: str) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    num_experts, hidden, size = 16, 512, 256
    x = torch.randn(NUM_ROWS[-1], hidden, generator=generator, device="cuda").to(BF16)
    router = torch.randn(num_experts, hidden, generator=generator, device="cuda").to(BF16)
    matrices = []
    for shape in ((num_experts, 2 * size, hidden), (num_experts, hidden, size)):
        weight = (torch.randn(shape, generator=generator, device="cuda") / shape[2] ** 0.5).to(BF16)
        if kind == "float8":
            quantized = per_token_quantize_reference(weight.view(-1, shape[2]))
            matrices.append(ExpertMatrix(quantized.values.view(shape), quantized.scales.view(shape[:2])))
        else:
            matrices.append(ExpertMatrix(weight))
    weights = ExpertWeights(*matrices, batch_invariant=True)
    routers = pack_linear_weight(router, batch_invariant=True)

    def compute(rows: torch.Tensor) -> torch.Tensor:
        return run_experts(rows, route(linear(rows, routers), 4, normalize=True), weights)

    check_rows(compute, x, compute(x))


@pytest.mark.gpu
def test_block_scaled_rows_have_the_same_bits_in_any_company() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(NUM_ROWS[-1], 1024, generator=generator, device="cuda").to(BF16)
    values = torch.randn(768, 1024, generator=generator, device="cuda").to(torch.float8_e4m3fn)
    weight = BlockScaledWeight.of(values, torch.rand(6, 8, generator=generator, device="cuda"), batch_invariant=True)
    check_rows(lambda rows: block_scaled_linear(rows, weight, None), x, block_scaled_linear(x, weight, None))
