"""Products of few rows against float64: interpreted with tiny shapes, and on a GPU with those of an 8B model."""

from __future__ import annotations

import pytest
import torch

from tests.support.triton_kernels import TOLERANCES, relative_error
from tokenmill.ops.fp8 import Fp8Weight, QuantizedRows, per_token_quantize_reference
from tokenmill.ops.linear import StreamedWeight, linear, linear_streamed, new_arrivals, pack_linear_weight
from tokenmill.ops.linear_plan import StreamPlan, matvec_plan, num_arrivals, small_batch_plan

pytest.importorskip("triton")
from tokenmill.ops.triton.linear import small_batch
from tokenmill.ops.triton.matvec import matvec

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(1, 1), (3, 40), (37, 70), (64, 64)]  # output and input features
REAL_SHAPES = [(6144, 4096), (4096, 14336), (4001, 4104)]
real = pytest.mark.gpu


def inputs(
    num_rows: int, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, shape[1] + 3, generator=generator)[:, : shape[1]]  # rows of a wider tensor
    weight = torch.randn(shape, generator=generator)
    bias = torch.randn(shape[0], generator=generator) * 10
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    exact = x.double() @ weight.double().T
    return exact if bias is None else exact + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_matvec(shape: tuple[int, int], with_bias: bool, dtype: torch.dtype, device: str) -> None:
    x, weight, bias = inputs(1, shape, dtype, device)
    used_bias = bias if with_bias else None
    for plan in (matvec_plan(*shape, dtype.itemsize), StreamPlan("matvec", 4, 16, 1)):
        actual = matvec(x, weight, None, used_bias, plan)
        assert actual.dtype == dtype
        assert relative_error(actual, product(x, weight, used_bias)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matvec_with_float8_weights(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x, weight, bias = inputs(1, shape, dtype, device)
    quantized = Fp8Weight.of(per_token_quantize_reference(weight))
    actual = matvec(x, quantized.values, quantized.scales, bias, matvec_plan(*shape, 1))
    assert relative_error(actual, product(x, quantized.dequantized(torch.float32), bias)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_splits", [1, 2, 3])
def test_small_batch(num_rows: int, shape: tuple[int, int], num_splits: int, device: str) -> None:
    """Splits add up in a fixed order, leave the counters at zero, and give the same result again."""
    x, weight, bias = inputs(num_rows, shape, torch.bfloat16, device)
    arrivals = new_arrivals(weight)
    plan = StreamPlan("small_batch", 64, 16, 4, 2, num_splits, block_rows=16)
    used_bias = bias if num_rows != 2 else None
    actual = small_batch(x, None, weight, None, used_bias, arrivals, plan, x.dtype)
    assert relative_error(actual, product(x, weight, used_bias)) <= TOLERANCES[torch.bfloat16]
    assert int(arrivals.abs().sum()) == 0
    assert torch.equal(small_batch(x, None, weight, None, used_bias, arrivals, plan, x.dtype), actual)


@pytest.mark.parametrize("num_rows", [2, 17])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_splits", [1, 2])
def test_small_batch_in_float8(num_rows: int, shape: tuple[int, int], num_splits: int, device: str) -> None:
    x, weight, bias = inputs(num_rows, shape, torch.bfloat16, device)
    rows, quantized = per_token_quantize_reference(x), Fp8Weight.of(per_token_quantize_reference(weight))
    plan = StreamPlan("small_batch", 64, 32, 4, 2, num_splits, block_rows=16)
    actual = small_batch(
        rows.values, rows.scales, quantized.values, quantized.scales, bias, quantized.arrivals, plan, torch.bfloat16
    )
    assert actual.dtype == torch.bfloat16
    expected = product(rows.values.double() * rows.scales[:, None], quantized.dequantized(torch.float32), bias)
    assert relative_error(actual, expected) <= TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("shape", [(37, 70)])
def test_linear_takes_the_planned_kernel(num_rows: int, shape: tuple[int, int], device: str) -> None:
    x, weight, bias = inputs(num_rows, shape, torch.bfloat16, device)
    prepared = StreamedWeight(weight, new_arrivals(weight))
    for rows in (x, torch.cat((x, x), dim=1)[:, ::2]):  # the second has no unit stride
        actual = linear(rows[:, : shape[1]], prepared, bias)
        assert relative_error(actual, product(rows[:, : shape[1]], weight, bias)) <= TOLERANCES[torch.bfloat16]


def test_linear_of_no_rows_and_of_many(device: str) -> None:
    for num_rows in (0, 65):
        x, weight, bias = inputs(num_rows, (6, 8), torch.bfloat16, device)
        actual = linear_streamed(x, StreamedWeight(weight, new_arrivals(weight)), bias)
        assert actual.shape == (num_rows, 6)
        assert relative_error(actual, product(x, weight, bias)) <= TOLERANCES[torch.bfloat16]


@real
@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 32, 33, 64, 65, 128, 129, 256, 500, 513])
@pytest.mark.parametrize("shape", REAL_SHAPES)
def test_real_shapes(num_rows: int, shape: tuple[int, int]) -> None:
    x, weight, bias = inputs(num_rows, shape, torch.bfloat16, "cuda")
    prepared = pack_linear_weight(weight)
    assert isinstance(prepared, StreamedWeight)
    actual = linear(x, prepared, bias)
    assert relative_error(actual, product(x, weight, bias)) <= 3e-3
    assert torch.equal(linear(x, prepared, bias), actual)
    assert int(prepared.arrivals.abs().sum()) == 0


@real
@pytest.mark.parametrize("num_rows", [1, 2, 17, 64])
def test_a_graph_gives_the_same_as_eager_launches(num_rows: int) -> None:
    """A chain of products and norms, where each launch may begin before the one ahead of it ends."""
    from tokenmill.ops.rms_norm import rms_norm

    weights = []
    for seed in range(6):
        torch.manual_seed(seed)
        weights.append(pack_linear_weight(torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) / 64))
    norm = torch.ones(4096, device="cuda", dtype=torch.bfloat16)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x = rms_norm(linear(x, weight), norm, 1e-5)
        return x

    given = torch.randn(num_rows, 4096, device="cuda", dtype=torch.bfloat16)
    expected = given
    for weight in weights:
        torch.cuda.synchronize()
        expected = linear(expected, weight)
        torch.cuda.synchronize()
        expected = rms_norm(expected, norm, 1e-5)
    chain(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(given)
    for _ in range(20):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)
        assert torch.equal(chain(given), expected)


def test_plans_cover_every_shape() -> None:
    """Blocks are powers of two, warps are few enough, and splits leave some blocks of input features for each."""
    for out_features in (1, 64, 576, 4096, 5120, 28672, 128256):
        for in_features in (1, 70, 576, 1536, 4096, 14336):
            for weight_bytes in (1, 2):
                plan = matvec_plan(out_features, in_features, weight_bytes)
                assert plan.block_out & (plan.block_out - 1) == 0 < plan.block_out
                assert plan.block_in & (plan.block_in - 1) == 0 < plan.block_in
                assert 1 <= plan.num_warps <= 16
                for num_rows in (2, 16, 33, 64, 100, 128, 256, 500, 512):
                    plan = small_batch_plan(num_rows, out_features, in_features, weight_bytes)
                    if plan.kernel == "small_batch":
                        row_blocks = -(-num_rows // plan.block_rows)
                        assert row_blocks * -(-out_features // plan.block_out) <= num_arrivals(out_features)
                        assert (
                            plan.num_splits == 1 or in_features >= plan.num_splits * 4 * plan.block_in - plan.block_in
                        )
                assert small_batch_plan(4096, out_features, in_features, weight_bytes).kernel == "library"
                assert small_batch_plan(0, out_features, in_features, weight_bytes).kernel == "library"


def test_narrow_outputs_are_split() -> None:
    assert small_batch_plan(16, 4096, 4096, 2).num_splits == 2
    assert small_batch_plan(16, 6144, 4096, 2).num_splits == 1
    assert small_batch_plan(16, 1024, 4096, 2).num_splits == 8
    assert small_batch_plan(16, 4096, 4096, 2).block_rows == 16
    assert small_batch_plan(33, 4096, 4096, 2).block_rows == 64
    assert small_batch_plan(100, 4096, 14336, 1).block_rows == 64
    assert small_batch_plan(100, 6144, 4096, 1).block_rows == 128
    assert small_batch_plan(200, 6144, 4096, 1).kernel == "library"
    assert [small_batch_plan(rows, 5120, 2048, 1).num_splits for rows in (16, 64, 128, 256)] == [1] * 4
    assert small_batch_plan(256, 5120, 2048, 1).block_out == 128
    assert small_batch_plan(64, 2048, 4096, 1).block_rows == 16  # blocks of rows before splits


def test_one_row_is_held_or_walked_over() -> None:
    assert matvec_plan(4096, 4096, 2) == StreamPlan("matvec", 2, 4096, 8, programs_per_multiprocessor=6)
    assert matvec_plan(28672, 4096, 1) == StreamPlan("matvec", 4, 4096, 8, programs_per_multiprocessor=4)
    assert matvec_plan(512, 3072, 2) == StreamPlan("matvec", 1, 4096, 8, programs_per_multiprocessor=6)
    assert matvec_plan(128256, 4096, 2) == StreamPlan("matvec", 4, 2048, 4)  # the head
    assert matvec_plan(5120, 5120, 2) == StreamPlan("matvec", 4, 1024, 2)  # held, it would idle three eighths of lanes
    assert matvec_plan(4096, 14336, 1) == StreamPlan("matvec", 4, 2048, 2)


def test_quantized_rows_are_a_pair() -> None:
    values, scales = QuantizedRows(torch.zeros(1, 2), torch.ones(1))
    assert values.shape == (1, 2) and scales.shape == (1,)
