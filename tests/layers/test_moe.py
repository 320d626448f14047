"""The layer with experts: names, ways to split it, quantization. Its numbers: `tests/models/test_logits.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.tiny_models import CPU, relative_error
from tokenmill.attention.select import select_backend
from tokenmill.errors import InvalidParameterError
from tokenmill.layers.context import LayerContext
from tokenmill.layers.linear import QKVLinear
from tokenmill.layers.moe import Router, SparseMoe, names_of_stack
from tokenmill.layers.norm import RMSNorm
from tokenmill.layers.weights import finalize_weights, weight_targets
from tokenmill.ops.expert_sum import PendingSum, summed
from tokenmill.ops.fp8 import per_token_quantize_fp8
from tokenmill.parallel.group import ParallelGroup
from tokenmill.quantization.base import PlainAndQuantized
from tokenmill.quantization.select import experts_method_for, linear_method_for


def context(group: ParallelGroup | None = None, *, expert_parallel: bool = False, name: str = "none") -> LayerContext:
    return LayerContext(
        dtype=torch.float32,
        device=CPU,
        backend=select_backend("auto", CPU),
        linear_method=linear_method_for(name),  # type: ignore[arg-type]
        experts_method=experts_method_for(name),  # type: ignore[arg-type]
        group=group or ParallelGroup(),
        expert_parallel=expert_parallel,
    )


def layer(layer_context: LayerContext) -> SparseMoe:
    return SparseMoe(
        16, 12, num_experts=6, top_k=2, activation="silu", normalize=True, context=layer_context.child("mlp")
    )


def filled(layer_context: LayerContext) -> SparseMoe:
    """A finalized layer, its checkpoint the same whatever it is split or quantized to."""
    moe = layer(layer_context)
    for name, target in weight_targets(moe).items():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        target.load(torch.randn(target.shape, generator=generator) * 0.3)
    finalize_weights(moe)
    return moe


def test_names() -> None:
    expected = {"gate.weight": (6, 16)}
    for expert in range(6):
        expected |= {f"experts.{expert}.{name}_proj.weight": (12, 16) for name in ("gate", "up")}
        expected[f"experts.{expert}.down_proj.weight"] = (16, 12)
    assert {name: target.shape for name, target in weight_targets(layer(context())).items()} == expected


def test_names_of_stacks() -> None:
    prefix = "model.layers.0.mlp.experts"
    assert names_of_stack(f"{prefix}.down_proj", 2) == [f"{prefix}.0.down_proj.weight", f"{prefix}.1.down_proj.weight"]
    both = [f"{prefix}.{expert}.{part}_proj.weight" for expert in (0, 1) for part in ("gate", "up")]
    assert names_of_stack(f"{prefix}.gate_up_proj", 2) == both
    assert names_of_stack(f"{prefix}.up_proj.weight", 1) == [f"{prefix}.0.up_proj.weight"]
    for other in (f"{prefix}.0.down_proj.weight", "model.layers.0.mlp.down_proj.weight", f"{prefix}.bias"):
        assert names_of_stack(other, 2) is None


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("name", ["none", "fp8"])
def test_two_ranks_add_up(expert_parallel: bool, name: str) -> None:
    """Without a process group the ranks' shares are not summed: the test does it."""
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    whole = filled(context(name=name))(x)
    shares = torch.zeros_like(whole)
    for rank in range(2):
        moe = filled(context(ParallelGroup(rank, 2), expert_parallel=expert_parallel, name=name))
        assert moe.experts.first_expert == (3 * rank if expert_parallel else 0)
        shares += summed(moe.experts.method.apply(x, moe.gate(x)))
    # A rank that holds half of a row has scales of its own for it.
    assert relative_error(shares, whole) < (1e-5 if name == "none" or expert_parallel else 0.08)


def test_experts_in_float8() -> None:
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    plain, quantized = filled(context())(x), filled(context(name="fp8"))(x)
    assert 1e-4 < relative_error(quantized, plain) < 0.1
    alone = filled(context(name="fp8"))(x[:1])
    assert relative_error(alone, plain[:1]) < 0.1


@pytest.mark.parametrize(
    ("size", "expert_parallel", "what"), [(5, False, "12 expert features"), (4, True, "6 experts")]
)
def test_ranks_must_divide(size: int, expert_parallel: bool, what: str) -> None:
    with pytest.raises(InvalidParameterError, match=what) as error:
        layer(context(ParallelGroup(0, size), expert_parallel=expert_parallel))
    assert error.value.field == "tensor_parallel_size"


def test_the_router_is_whole_on_every_rank() -> None:
    router = Router(16, 6, 2, normalize=False, context=context(ParallelGroup(1, 2)))
    assert router.weight.shape == (6, 16)


@pytest.mark.parametrize("num_rows", [1, 4, 5])
def test_a_norm_gives_the_experts_quantized_rows_and_the_router_plain_ones(num_rows: int) -> None:
    norm = RMSNorm(16, 1e-5, context())
    moe = filled(context(name="fp8"))
    x, residual = (torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    rows, stream = norm.add_and_norm_for(moe, x, residual)
    plain, plain_stream = norm.add_and_norm(x, residual)
    assert isinstance(rows, PlainAndQuantized) == (num_rows > 4)
    if isinstance(rows, PlainAndQuantized):
        assert torch.equal(rows.plain, plain)
        assert torch.equal(rows.quantized.values, per_token_quantize_fp8(plain).values)
    assert torch.equal(stream, plain_stream)
    assert torch.equal(moe(rows), moe(plain))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["none", "fp8"])
@pytest.mark.parametrize("num_rows", [4, 5, 300])
def test_the_norm_behind_experts_adds_them_up(num_rows: int, name: str) -> None:
    """On a GPU, from five tokens on; its consumer gets the same as if they had been added up before."""
    gpu = torch.device("cuda")
    on_gpu = replace(context(name=name), dtype=torch.bfloat16, device=gpu, backend=select_backend("auto", gpu))
    moe, norm = filled(on_gpu), RMSNorm(16, 1e-5, on_gpu)
    consumer = QKVLinear(16, 2, 1, 16, bias=False, context=on_gpu)
    for target in weight_targets(consumer).values():
        target.load(torch.randn(target.shape, generator=torch.Generator().manual_seed(0)))
    finalize_weights(consumer)
    x, residual = torch.randn(2, num_rows, 16, device=gpu, dtype=torch.bfloat16)
    added = moe(x)
    assert isinstance(added, PendingSum) == (num_rows > 4)
    rows, stream = norm.add_and_norm_for(consumer, added, residual)
    expected_rows, expected_stream = norm.add_and_norm_for(consumer, summed(added), residual)
    assert relative_error(stream, expected_stream) < 5e-3  # sums in another order
    assert relative_error(consumer(rows), consumer(expected_rows)) < 3e-2
