"""One row's product with its norm and activation against float64: in triton's interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.support.triton_kernels import TOLERANCES, relative_error
from tokenmill.ops import row_product
from tokenmill.ops.fp8 import per_token_quantize_reference
from tokenmill.ops.linear_plan import StreamPlan
from tokenmill.ops.row_product import PendingNorm, can_fuse, choose, row_product_reference

pytest.importorskip("triton")
from tokenmill.ops.row_product import row_product_triton

pytestmark = pytest.mark.usefixtures("poisoned", "way")
SHAPES = [(2, 4), (6, 40), (38, 72), (64, 1064)]  # output and input features
REAL_SHAPES = [pytest.param(shape, marks=pytest.mark.gpu) for shape in ((6144, 4096), (28672, 4096), (4096, 14336))]
BF16 = torch.bfloat16


def walks_features(out_features: int, in_features: int, weight_bytes: int) -> StreamPlan:
    """Few programs, so that each of them walks over several blocks of features."""
    whole_row = 1 << (in_features - 1).bit_length()
    return StreamPlan("matvec", 4, whole_row, max(1, whole_row // 1024), programs_per_multiprocessor=2)


@pytest.fixture(params=["as planned", "walks the row", "walks the features"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that computes these products."""
    if request.param == "walks the features":
        monkeypatch.setattr(row_product, "matvec_plan", walks_features)
    elif request.param == "walks the row":
        monkeypatch.setattr(row_product, "matvec_plan", lambda *_: StreamPlan("matvec", 4, 256, 1))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = normal(1, *shape)
    if dtype != torch.float8_e4m3fn:
        return weight.to(device, dtype), None
    values, scales = per_token_quantize_reference(weight)
    return values.to(device), scales.to(device)


def exact(
    row: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    product = row.double() @ (weight.double() if weight.is_cuda is row.is_cuda else weight.to(row.device).double()).T
    product = product if scale is None else product * scale.double()
    return product if bias is None else product + bias.double()


@pytest.mark.spec("E2")
@pytest.mark.parametrize("weight_dtype", [BF16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [*SHAPES, *REAL_SHAPES])
@pytest.mark.parametrize("has_residual", [False, True])
def test_norm_before_the_product(
    shape: tuple[int, int], has_residual: bool, weight_dtype: torch.dtype, device: str
) -> None:
    dtype = BF16 if weight_dtype == torch.float8_e4m3fn else weight_dtype
    weight, scale = weights(shape, weight_dtype, device)
    x, residual, factors = (normal(seed, 1, shape[1]).to(device, dtype) for seed in (2, 3, 4))
    bias = normal(5, shape[0]).to(device, dtype)
    pending = PendingNorm.of(x, residual if has_residual else None, factors[0], 1e-5)
    actual = row_product_triton(pending, weight, scale, bias, "")
    stream = x + residual if has_residual else x
    assert actual.dtype == dtype
    assert relative_error(pending.stream, stream) <= TOLERANCES[dtype]
    if device == "cuda":  # the interpreter does not round bfloat16
        assert torch.equal(pending.stream, stream)
    given = pending.stream.double()
    normalized = given / (given.square().mean() + 1e-5).sqrt() * factors.double()
    assert relative_error(actual, exact(normalized, weight, scale, bias)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("weight_dtype", [BF16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [*SHAPES, *REAL_SHAPES])
@pytest.mark.parametrize("has_norm", [False, True])
def test_activation_behind_the_product(
    shape: tuple[int, int], has_norm: bool, weight_dtype: torch.dtype, activation: str, device: str
) -> None:
    weight, scale = weights(shape, weight_dtype, device)
    x, factors = (normal(seed, 1, shape[1]).to(device, BF16) * shape[1] ** -0.5 for seed in (2, 3))
    given = PendingNorm.of(x, None, factors[0], 1e-5) if has_norm else x
    actual = row_product_triton(given, weight, scale, None, activation)
    row = x.double() / (x.double().square().mean() + 1e-5).sqrt() * factors.double() if has_norm else x
    gate, up = exact(row, weight, scale, None).to(BF16).double().chunk(2, dim=1)
    gated = gate * gate.sigmoid() if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
    assert actual.shape == (1, shape[0] // 2)
    assert relative_error(actual, gated * up) <= 3 * TOLERANCES[BF16]  # the interpreter cuts bfloat16 off, twice
    expected = row_product_reference(given, weight, scale, None, activation)
    assert relative_error(actual, expected) <= 3 * TOLERANCES[BF16]


def test_a_row_as_it_is(device: str) -> None:
    weight, scale = weights((38, 72), torch.float8_e4m3fn, device)
    x = normal(2, 1, 72).to(device, BF16)
    actual = row_product_triton(x, weight, scale, None, "")
    assert relative_error(actual, exact(x, weight, scale, None)) <= TOLERANCES[BF16]
    assert relative_error(row_product_reference(x, weight, scale, None, ""), actual) <= TOLERANCES[BF16]


def test_what_is_not_finite_stays_so(device: str) -> None:
    """A request without an answer is told by its logits."""
    weight, _ = weights((6, 40), BF16, device)
    x, residual, factors = (normal(seed, 1, 40).to(device, BF16) for seed in (2, 3, 4))
    x[0, 7] = torch.nan
    pending = PendingNorm.of(x, residual, factors[0], 1e-5)
    assert row_product_triton(pending, weight, None, None, "").isnan().all()
    assert pending.stream.isnan().sum() == 1


def test_who_may_leave_a_norm_to_its_product() -> None:
    assert choose(torch.device("cpu")) == "reference"
    assert not can_fuse(torch.zeros(1, 8), torch.zeros(4, 8))


@pytest.mark.gpu
def test_rows_that_come_in_words_are_fused() -> None:
    weight = torch.zeros(4, 72, device="cuda", dtype=BF16)
    x = torch.zeros(2, 80, device="cuda", dtype=BF16)
    assert can_fuse(x[:1, :72], weight)
    assert not can_fuse(x[:, :72], weight)
    assert not can_fuse(x[:1, 1:73], weight)
    assert not can_fuse(x[:1, :72].float(), weight)
    assert not can_fuse(x[:1, :70], weight[:, :70])
