"""`LinearMethod`: how one linear layer stores and applies its weight. Models and layers never name a format.

A layer asks the factory in its `LayerContext` for a method (one object per layer), then calls, in this order:
`create_weights` when it is built, `process_after_loading` once its parameters are filled, `apply` in every step.
`ExpertsMethod` is the same for the experts of a mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import nn

from tokenmill.ops.expert_sum import PendingSum
from tokenmill.ops.fp8 import QuantizedRows
from tokenmill.ops.moe import Routing
from tokenmill.ops.row_product import OneRow, PendingNorm

Rows: TypeAlias = torch.Tensor | QuantizedRows | PendingNorm
"""What a linear layer takes: [T, in_features], plain, quantized by the op before it, or one row before its norm."""
Added: TypeAlias = torch.Tensor | PendingSum
"""What a block adds to the residual stream: [T, H], or experts' results that the norm behind the block adds up."""


class PlainAndQuantized(NamedTuple):
    """The same rows twice, for a block whose first layers do not all take quantized ones."""

    plain: torch.Tensor
    quantized: QuantizedRows


class RowForm(Enum):
    """In which form a layer, or a block of some, takes rows fastest; each takes plain rows as well.

    So the op before it asks one question, `row_form`, and gives plain rows where it cannot make the form of the answer.
    """

    PLAIN = "a tensor"
    QUANTIZED = "`QuantizedRows`"
    PLAIN_AND_QUANTIZED = "`PlainAndQuantized`"
    PENDING_NORM = "one row before its norm: `PendingNorm`"


class ParameterAxes(NamedTuple):
    """Which axes of a parameter run over the layer's output and input features; None: it has no such axis.

    A packed or grouped axis may be shorter than the number of features; parts and shards scale with its length.
    """

    output: int | None
    input: int | None


class LinearMethod(Protocol):
    """Owns the weight of one linear layer."""

    def create_weights(
        self, layer: nn.Module, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, ParameterAxes]:
        """Register the (uninitialized) parameters that a checkpoint fills on `layer`; returns their axes by name."""
        ...

    def process_after_loading(self, layer: nn.Module) -> None:
        """Turn the filled parameters into the form that `apply` reads; may remove them from `layer`."""
        ...

    def row_form(self, x: torch.Tensor) -> RowForm:
        """The form in which rows like x [T, ...], of its number, type and device, are taken fastest."""
        ...

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[T, in_features] to [T, out_features]."""
        ...


@runtime_checkable
class TakesQuantizedRows(Protocol):
    """A `LinearMethod` whose `row_form` may be QUANTIZED: `apply` would quantize the rows."""

    def apply_quantized(self, x: QuantizedRows, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Rows [T, in_features], quantized already, to [T, out_features] of type `dtype`."""
        ...


@runtime_checkable
class AddsProduct(Protocol):
    """A `LinearMethod` whose product can be added to a tensor in the pass that computes it."""

    def adds(self, num_rows: int, dtype: torch.dtype) -> bool:
        """Whether that is there, and faster than an addition in the norm that follows, for so many rows of a type."""
        ...

    def add_product(self, total: torch.Tensor, x: torch.Tensor | QuantizedRows) -> None:
        """Add the product of x [T, in_features] to `total` [T, out_features], contiguous."""
        ...


@runtime_checkable
class FusesOneRow(Protocol):
    """A `LinearMethod` whose `row_form` may be PENDING_NORM.

    Its product of one row includes the norm before it and the gated activation behind it.
    """

    def apply_fused(self, x: OneRow, bias: torch.Tensor | None, activation: str = "") -> torch.Tensor:
        """See `ops.row_product.row_product`."""
        ...


@runtime_checkable
class ConvertsWhileLoading(Protocol):
    """A `LinearMethod` whose parameters are not what the checkpoint holds: tensors are converted as they arrive.

    So a model is never in memory in two forms.
    """

    def store(self, layer: nn.Module, name: str, start: int, tensor: torch.Tensor) -> None:
        """Take in `tensor`, this rank's part of a projection: the output features from `start` of parameter `name`."""
        ...


LinearMethodFactory: TypeAlias = Callable[[str], LinearMethod]
"""Makes the method of the layer with the given full name, such as `model.layers.0.mlp.down_proj`."""


ExpertProjection: TypeAlias = Literal["gate", "up", "down"]


class ExpertSizes(NamedTuple):
    """The experts of one layer that this rank holds, and the features of this rank's part of each."""

    num_experts: int
    hidden_size: int
    intermediate_size: int


class ExpertParameter(NamedTuple):
    """A parameter of all experts of a layer, which a checkpoint fills one projection of one expert at a time.

    Args:
        gate: [E, ...], what the gate projections fill; may be a view of a tensor that up projections share.
        up, down: [E, ...], likewise.
        axes: of one expert's part, an entry of the three.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    axes: ParameterAxes


class ExpertsMethod(Protocol):
    """Owns the weights of the experts of one layer."""

    def create_weights(
        self, layer: nn.Module, sizes: ExpertSizes, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, ExpertParameter]:
        """Register the (uninitialized) parameters on `layer`; returns what a checkpoint fills of them, by name."""
        ...

    def process_after_loading(self, layer: nn.Module, activation: str, first_expert: int) -> None:
        """Turn the filled parameters into the form that `apply` reads; may remove them from `layer`."""
        ...

    def row_form(self, x: torch.Tensor) -> RowForm:
        """PLAIN_AND_QUANTIZED if `apply` would quantize x [T, H] with a scale for each row; else PLAIN."""
        ...

    def apply(self, x: torch.Tensor, routing: Routing) -> Added:
        """[T, H] to [T, H]: what this rank's experts add, see `ops.moe.expert_products`."""
        ...


@runtime_checkable
class TakesQuantizedExpertRows(Protocol):
    """An `ExpertsMethod` whose `row_form` may be PLAIN_AND_QUANTIZED."""

    def apply_quantized(self, x: torch.Tensor, quantized: QuantizedRows, routing: Routing) -> Added:
        """`apply`, with x quantized already."""
        ...


@runtime_checkable
class ConvertsExpertsWhileLoading(Protocol):
    """An `ExpertsMethod` whose parameters are not what the checkpoint holds."""

    def store(self, name: str, projection: ExpertProjection, expert: int, tensor: torch.Tensor) -> None:
        """Take in `tensor`, this rank's part of parameter `name` of one projection; `expert` counts this rank's."""
        ...


ExpertsMethodFactory: TypeAlias = Callable[[str], ExpertsMethod]
"""Makes the method of the experts with the given full name, such as `model.layers.0.mlp.experts`."""
