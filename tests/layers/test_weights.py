from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tokenmill.errors import CheckpointError
from tokenmill.layers.weights import Shard, WeightTarget, finalize_weights, weight_targets


class Merged(nn.Module):
    """Two checkpoint tensors in one parameter; remembers that it was finalized."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 3), requires_grad=False)
        self.inner = nn.Linear(2, 2)  # not a target: the module speaks for its children
        self.num_finalized = 0

    def named_weight_targets(self, prefix: str) -> Iterator[tuple[str, WeightTarget]]:
        yield f"{prefix}.first", WeightTarget(self.weight.data[:2])
        yield f"{prefix}.second", WeightTarget(self.weight.data[2:])

    def finalize_weights(self) -> None:
        self.num_finalized += 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.layers = nn.ModuleList([Merged(), nn.Linear(3, 4)])


def test_names_and_shapes() -> None:
    targets = weight_targets(Model())
    assert {name: target.shape for name, target in targets.items()} == {
        "scale": (1,),
        "layers.0.first": (2, 3),
        "layers.0.second": (3, 3),
        "layers.1.weight": (4, 3),
        "layers.1.bias": (4,),
    }


def test_load_fills_the_part_and_converts() -> None:
    model = Model()
    weight_targets(model)["layers.0.second"].load(torch.full((3, 3), 2.5, dtype=torch.float64))
    merged = model.layers[0]
    assert isinstance(merged, Merged)
    assert torch.equal(merged.weight, torch.tensor([[0.0] * 3] * 2 + [[2.5] * 3] * 3))


@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (9,), (3, 3, 1)])
def test_another_shape_is_refused_even_if_it_could_be_broadcast(shape: tuple[int, ...]) -> None:
    target = weight_targets(Model())["layers.0.second"]
    with pytest.raises(CheckpointError, match=r"\(3, 3\)"):
        target.load(torch.zeros(shape))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_shard_takes_its_part(axis: int) -> None:
    tensor = torch.arange(24.0).view(6, 4)
    parts = []
    for start in (0, 2):
        size = [2, 4] if axis == 0 else [6, 2]
        target = WeightTarget(torch.zeros(size), Shard(axis, start, tensor.shape[axis]))
        assert target.shape == (6, 4)
        target.load(tensor)
        parts.append(target.destination)
    assert torch.equal(torch.cat(parts, dim=axis), tensor[:4] if axis == 0 else tensor)


def test_a_shard_refuses_a_tensor_of_the_shards_own_size() -> None:
    target = WeightTarget(torch.zeros(2, 4), Shard(0, 2, 6))
    with pytest.raises(CheckpointError):
        target.load(torch.zeros(2, 4))


def test_finalize_reaches_every_module_once() -> None:
    model = Model()
    finalize_weights(model)
    merged = model.layers[0]
    assert isinstance(merged, Merged)
    assert merged.num_finalized == 1
