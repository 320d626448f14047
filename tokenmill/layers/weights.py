"""Where checkpoint tensors go: every layer lists the tensors that it expects, under their Hugging Face names.

`weight_targets(model)` walks a model and gives one `WeightTarget` for each tensor that its checkpoint must hold. A
merged layer (query, key and value in one matrix) lists several targets that fill parts of one parameter. The loader in
`checkpoints/` matches names against this table: nothing is left over on either side, or it is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """One checkpoint tensor's destination: the part `destination` (a view) of a parameter, of equal shape."""

    destination: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that the checkpoint tensor must have."""
        return tuple(self.destination.shape)

    def load(self, tensor: torch.Tensor) -> None:
        """Copy `tensor` in, converting type and device."""
        with torch.no_grad():
            self.destination.copy_(tensor)


@runtime_checkable
class HasWeightTargets(Protocol):
    """A module whose checkpoint names differ from its parameters' names."""

    def named_weight_targets(self, prefix: str) -> Iterator[tuple[str, WeightTarget]]:
        """(full checkpoint name, target) for every tensor of this module; `prefix` is the module's own full name."""
        ...


def weight_targets(model: nn.Module) -> Mapping[str, WeightTarget]:
    """Every checkpoint tensor that `model` expects, by name; parameters shared between modules appear once."""
    found: dict[str, WeightTarget] = {}
    seen: set[int] = set()
    claimed: tuple[str, ...] = ()
    for prefix, module in model.named_modules():  # parents come before their children
        if claimed and any(prefix.startswith(f"{name}.") for name in claimed):
            continue
        if isinstance(module, HasWeightTargets):
            seen.update(id(parameter) for parameter in module.parameters())
            found.update(module.named_weight_targets(prefix))
            claimed = (*claimed, prefix)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{prefix}.{name}" if prefix else name] = WeightTarget(parameter.data)
    return found
