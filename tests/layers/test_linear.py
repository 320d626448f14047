"""Sharded layers in one process: every rank's shard, put together, is the whole layer."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from tokenmill.attention.reference import ReferenceAttention
from tokenmill.errors import InvalidParameterError
from tokenmill.layers.context import LayerContext
from tokenmill.layers.embedding import LMHead, VocabParallelEmbedding
from tokenmill.layers.linear import MergedColumnLinear, QKVLinear, RowParallelLinear
from tokenmill.layers.weights import finalize_weights, weight_targets
from tokenmill.parallel.group import ParallelGroup
from tokenmill.quantization.base import ParameterAxes
from tokenmill.quantization.unquantized import UnquantizedLinear


def context(rank: int = 0, size: int = 1, name: str = "layer") -> LayerContext:
    group = ParallelGroup(rank=rank, size=size)
    return LayerContext(
        dtype=torch.float32, device=torch.device("cpu"), backend=ReferenceAttention(), group=group, prefix=name
    )


def fill(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load and finalize; names are those of a module called `m.<layer>`."""
    holder = nn.Module()
    holder.add_module("qkv_proj", layer)
    targets = weight_targets(holder)
    assert targets.keys() == tensors.keys()
    for name, target in targets.items():
        target.load(tensors[name])
    finalize_weights(layer)


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def qkv_tensors(num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, heads in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)):
        shapes[f"{name}_proj.weight"] = (heads * 4, 10)
        shapes[f"{name}_proj.bias"] = (heads * 4,)
    return random_tensors(shapes)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size"), [(6, 2, 1), (6, 2, 2), (8, 4, 4), (8, 2, 4), (4, 1, 2)])
def test_qkv(num_heads: int, num_kv_heads: int, size: int) -> None:
    tensors = qkv_tensors(num_heads, num_kv_heads)
    x = torch.randn(3, 10)
    whole = {
        name: (x @ tensors[f"{name}_proj.weight"].T + tensors[f"{name}_proj.bias"]).view(3, -1, 4) for name in "qkv"
    }
    heads_per_kv_head = num_heads // num_kv_heads
    for rank in range(size):
        layer = QKVLinear(10, num_heads, num_kv_heads, 4, bias=True, context=context(rank, size))
        fill(layer, tensors)
        query, key, value = layer(x).split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
        first = rank * num_heads // size
        torch.testing.assert_close(query, whole["q"][:, first : first + num_heads // size])
        # Each query head of the rank finds its own key/value head at its place in the rank's group.
        for head in range(query.shape[1]):
            local = head // (query.shape[1] // key.shape[1])
            torch.testing.assert_close(key[:, local], whole["k"][:, (first + head) // heads_per_kv_head])
            torch.testing.assert_close(value[:, local], whole["v"][:, (first + head) // heads_per_kv_head])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_merged_columns(size: int) -> None:
    tensors = random_tensors({"gate_proj.weight": (12, 5), "up_proj.weight": (6, 5)})
    x = torch.randn(2, 5)
    parts: dict[str, list[torch.Tensor]] = {"gate_proj": [], "up_proj": []}
    for rank in range(size):
        layer = MergedColumnLinear(5, {"gate_proj": 12, "up_proj": 6}, bias=False, context=context(rank, size))
        fill(layer, tensors)
        gate, up = layer(x).split([12 // size, 6 // size], dim=-1)
        parts["gate_proj"].append(gate)
        parts["up_proj"].append(up)
    for name, outputs in parts.items():
        torch.testing.assert_close(torch.cat(outputs, dim=-1), x @ tensors[f"{name}.weight"].T)


def test_rows_of_all_ranks_sum_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias is added by one rank only."""
    tensors = random_tensors({"qkv_proj.weight": (7, 8), "qkv_proj.bias": (7,)})
    x = torch.randn(2, 8)
    monkeypatch.setattr(ParallelGroup, "all_reduce", lambda group, tensor: tensor)
    total = torch.zeros(2, 7)
    for rank in range(2):
        layer = RowParallelLinear(8, 7, bias=True, context=context(rank, 2))
        fill(layer, tensors)
        total += layer(x[:, rank * 4 : rank * 4 + 4])
    torch.testing.assert_close(total, x @ tensors["qkv_proj.weight"].T + tensors["qkv_proj.bias"])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_vocabulary_that_does_not_divide(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """11 tokens over 2 or 3 ranks: the last rank's padding is never seen."""
    matrix = torch.randn(11, 4)
    input_ids = torch.arange(11)
    monkeypatch.setattr(ParallelGroup, "all_reduce", lambda group, tensor: tensor)
    monkeypatch.setattr(ParallelGroup, "all_gather", lambda group, tensor: tensor)
    embedded = torch.zeros(11, 4)
    logits = []
    for rank in range(size):
        embedding = VocabParallelEmbedding(11, 4, context(rank, size))
        head = LMHead(11, 4, tied_to=None, context=context(rank, size))
        for layer in (embedding, head):
            fill(layer, {"qkv_proj.weight": matrix})
        embedded += embedding(input_ids)
        logits.append(head(matrix))
    torch.testing.assert_close(embedded, matrix)
    torch.testing.assert_close(torch.cat(logits, dim=-1)[:, :11], matrix @ matrix.T)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InvalidParameterError, match="9 attention heads") as error:
        QKVLinear(8, 9, 3, 4, bias=False, context=context(0, 2))
    assert error.value.field == "tensor_parallel_size"
    with pytest.raises(InvalidParameterError, match="key/value heads"):
        QKVLinear(8, 12, 3, 4, bias=False, context=context(0, 2))


def test_each_layer_asks_for_its_method_by_name() -> None:
    asked: list[str] = []

    def factory(name: str) -> UnquantizedLinear:
        asked.append(name)
        return UnquantizedLinear()

    base = LayerContext(
        dtype=torch.float32,
        device=torch.device("cpu"),
        backend=ReferenceAttention(),
        linear_method=factory,
    )
    block = base.child("model").child("layers.0").child("mlp")
    RowParallelLinear(4, 4, bias=False, context=block.child("down_proj"))
    assert asked == ["model.layers.0.mlp.down_proj"]


class TwoInOneByte(UnquantizedLinear):
    """A method that packs two output features, and two input features of its scales, into one element."""

    def create_weights(
        self, layer: nn.Module, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, ParameterAxes]:
        packed = torch.zeros(out_features // 2, in_features, dtype=torch.uint8)
        layer.register_parameter("packed", nn.Parameter(packed, requires_grad=False))
        scales = torch.zeros(in_features // 2, out_features)
        layer.register_parameter("scales", nn.Parameter(scales, requires_grad=False))
        return {"packed": ParameterAxes(output=0, input=1), "scales": ParameterAxes(output=1, input=0)}


def packed_context(rank: int, size: int) -> LayerContext:
    return LayerContext(
        dtype=torch.float32,
        device=torch.device("cpu"),
        backend=ReferenceAttention(),
        linear_method=lambda name: TwoInOneByte(),
        group=ParallelGroup(rank=rank, size=size),
    )


def test_packed_parameters_are_cut_by_their_own_extent() -> None:
    """A method whose parameters are shorter than the features, or transposed, needs no code in the layers."""
    tensors = {
        "gate_proj.packed": torch.arange(8 * 6).view(8, 6).to(torch.uint8),
        "gate_proj.scales": torch.randn(3, 16),
        "up_proj.packed": torch.arange(4 * 6).view(4, 6).to(torch.uint8),
        "up_proj.scales": torch.randn(3, 8),
    }
    layer = MergedColumnLinear(6, {"gate_proj": 16, "up_proj": 8}, bias=False, context=packed_context(1, 2))
    fill(layer, tensors)
    expected = torch.cat((tensors["gate_proj.packed"][4:], tensors["up_proj.packed"][2:]))
    assert torch.equal(layer.get_parameter("packed"), expected)
    expected = torch.cat((tensors["gate_proj.scales"][:, 8:], tensors["up_proj.scales"][:, 4:]), dim=1)
    assert torch.equal(layer.get_parameter("scales"), expected)


def test_packed_parameters_of_a_row_parallel_layer() -> None:
    tensors = {
        "qkv_proj.packed": torch.arange(4 * 12).view(4, 12).to(torch.uint8),
        "qkv_proj.scales": torch.randn(6, 8),
    }
    layer = RowParallelLinear(12, 8, bias=False, context=packed_context(1, 2))
    fill(layer, tensors)
    assert torch.equal(layer.get_parameter("packed"), tensors["qkv_proj.packed"][:, 6:])
    assert torch.equal(layer.get_parameter("scales"), tensors["qkv_proj.scales"][3:])
