"""A router's product and choice: its launches against the definitions, and which steps take which way."""

from __future__ import annotations

import pytest
import torch

from tokenmill.ops.linear import pack_linear_weight
from tokenmill.ops.moe import Routing, route_reference
from tokenmill.ops.moe_plan import MAX_ROUTER_EXPERTS, MAX_ROUTER_FEATURES, has_router_kernel
from tokenmill.ops.router import choose_experts

pytest.importorskip("triton")
from tokenmill.ops.triton.moe_router import route_rows

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.spec("E2")]
SHAPES = [(1, 4, 40, 2), (5, 6, 300, 3), (33, 20, 600, 4)]  # tokens, experts, features, experts of a token
REAL = [pytest.param((tokens, 128, 2048, 8), marks=pytest.mark.gpu) for tokens in (5, 16, 17, 256, 500)]


def inputs(shape: tuple[int, int, int, int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of a wider tensor, weight)."""
    num_tokens, num_experts, size, _ = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, size + 8, generator=generator)[:, :size]
    weight = torch.randn(num_experts, size, generator=generator) / size**0.5
    return x.to(device, torch.bfloat16), weight.to(device, torch.bfloat16)


def assert_same_choice(actual: Routing, logits: torch.Tensor, top_k: int, normalize: bool) -> None:
    """Experts as likely as the definition's, each once, with their shares: of equal logits any may be chosen.

    Sums in another order may be rounded to the other of two neighbouring bfloat16 numbers.
    """
    expected = route_reference(logits, top_k, normalize)
    assert actual.experts.dtype == torch.int32 and actual.weights.dtype == torch.float32
    assert all(len(set(experts)) == top_k for experts in actual.experts.tolist())
    assert bool((actual.weights.diff(dim=1) <= 0).all())
    chosen = logits.float().gather(1, actual.experts.long())
    torch.testing.assert_close(chosen, logits.float().gather(1, expected.experts.long()), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(actual.weights, expected.weights, atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, *REAL])
def test_route_rows(shape: tuple[int, int, int, int], normalize: bool, device: str) -> None:
    """Parts add up in a fixed order: the result is the same again."""
    x, weight = inputs(shape, device)
    actual = Routing(*route_rows(x, weight, shape[3], normalize))
    logits = (x.double() @ weight.double().T).bfloat16()
    assert_same_choice(actual, logits, shape[3], normalize)
    again = route_rows(x, weight, shape[3], normalize)
    assert torch.equal(again[0], actual.experts) and torch.equal(again[1], actual.weights)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_broken_rows_stay_within_the_experts(device: str) -> None:
    x, weight = inputs((3, 5, 40, 3), device)
    x[1] = float("nan")
    experts, shares = route_rows(x, weight, 3, True)
    assert bool(((experts >= 0) & (experts < 5)).all())
    assert bool(shares[0::2].isfinite().all())


@pytest.mark.parametrize("num_tokens", [0, 1, 4, 5, 256, 257])
def test_each_number_of_tokens(num_tokens: int, device: str) -> None:
    """Whichever way they go."""
    x, weight = inputs((num_tokens, 6, 64, 2), device)
    actual = choose_experts(x, pack_linear_weight(weight), 2, normalize=True)
    assert actual.experts.shape == (num_tokens, 2)
    if num_tokens:
        assert_same_choice(actual, (x.double() @ weight.double().T).bfloat16(), 2, True)


def test_which_steps_have_launches_of_their_own() -> None:
    assert has_router_kernel(256, 128, 2048) and has_router_kernel(5, 8, 4096)
    assert not has_router_kernel(4, 128, 2048) and not has_router_kernel(257, 128, 2048)
    assert not has_router_kernel(256, MAX_ROUTER_EXPERTS + 1, 2048)
    assert not has_router_kernel(256, 8, MAX_ROUTER_FEATURES + 1)
