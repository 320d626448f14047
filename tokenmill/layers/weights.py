"""Where checkpoint tensors go: every layer lists the tensors that it expects, under their Hugging Face names.

`weight_targets(model)` walks a model and gives one `WeightTarget` for each tensor that its checkpoint must hold. A
merged layer (query, key and value in one matrix) lists several targets that fill parts of one parameter; a sharded
layer's targets take only this rank's part of the tensor. The loader in `checkpoints/` matches names against this table
(nothing is left over on either side, or it is an error) and then calls `finalize_weights(model)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from tokenmill.errors import CheckpointError


class Shard(NamedTuple):
    """The part of a checkpoint tensor that this rank holds: along `axis`, from `start`, of `full_size` in all."""

    axis: int
    start: int
    full_size: int


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """One checkpoint tensor's destination: `destination`, a view of (a part of) a parameter.

    Args:
        destination: filled by `load`.
        shard: which part of the checkpoint tensor goes there; None: all of it.
        store: takes that part in, if more is to be done than to copy it.
    """

    destination: torch.Tensor
    shard: Shard | None = None
    store: Callable[[torch.Tensor], None] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that the (whole) checkpoint tensor must have."""
        shape = list(self.destination.shape)
        if self.shard is not None:
            shape[self.shard.axis] = self.shard.full_size
        return tuple(shape)

    def load(self, tensor: torch.Tensor) -> None:
        """Copy this rank's part of `tensor` in, converting type and device.

        Raises:
            CheckpointError: `tensor` has another shape.
        """
        if tuple(tensor.shape) != self.shape:
            raise CheckpointError(f"A tensor of shape {tuple(tensor.shape)} was given where {self.shape} is expected.")
        if self.shard is not None:
            tensor = tensor.narrow(self.shard.axis, self.shard.start, self.destination.shape[self.shard.axis])
        with torch.no_grad():
            if self.store is not None:
                self.store(tensor)
            else:
                self.destination.copy_(tensor)


@runtime_checkable
class HasWeightTargets(Protocol):
    """A module whose checkpoint tensors are not simply its parameters."""

    def named_weight_targets(self, prefix: str) -> Iterator[tuple[str, WeightTarget]]:
        """(full checkpoint name, target) for every tensor of this module; `prefix` is the module's own full name."""
        ...


@runtime_checkable
class HasFinalize(Protocol):
    """A module that prepares its filled weights for the forward pass (packs them, merges them, frees originals)."""

    def finalize_weights(self) -> None:
        """Called once, after all parameters of the model are filled."""
        ...


def weight_targets(model: nn.Module) -> Mapping[str, WeightTarget]:
    """Every checkpoint tensor that `model` can take, by full name."""
    return dict(_walk(model, ""))


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, WeightTarget]]:
    if isinstance(module, HasWeightTargets):
        yield from module.named_weight_targets(prefix)
        return
    for name, parameter in module.named_parameters(prefix, recurse=False):
        yield name, WeightTarget(parameter.data)
    for name, child in module.named_children():
        yield from _walk(child, join_name(prefix, name))


def join_name(prefix: str, name: str) -> str:
    """The full name of `name` inside the module `prefix`, which is empty for the outermost one."""
    return f"{prefix}.{name}" if prefix else name


def finalize_weights(model: nn.Module) -> None:
    """Let every layer prepare its weights; call it once, after the last `WeightTarget.load` and before `forward`."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, HasFinalize):
                module.finalize_weights()
