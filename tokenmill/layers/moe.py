"""Mixture of experts: a router picks a few gated MLPs for each token (https://arxiv.org/abs/2101.03961).

Over several ranks either every expert is split like a `GatedMLP`, or each rank holds some of the experts whole; the
router is on every rank, and what the ranks' experts add is summed. Used by models in the place of their MLP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final, get_args

import torch
from torch import nn

from tokenmill.layers.context import LayerContext
from tokenmill.layers.weights import Shard, WeightTarget, join_name
from tokenmill.ops.expert_sum import summed
from tokenmill.ops.fp8 import QuantizedRows
from tokenmill.ops.linear import PackedWeight, StreamedWeight, pack_linear_weight
from tokenmill.ops.moe import Routing
from tokenmill.ops.router import choose_experts
from tokenmill.quantization.base import (
    Added,
    ConvertsExpertsWhileLoading,
    ExpertParameter,
    ExpertProjection,
    ExpertSizes,
    PlainAndQuantized,
    RowForm,
    TakesQuantizedExpertRows,
)

PROJECTIONS: Final[tuple[ExpertProjection, ...]] = get_args(ExpertProjection)
_STACKED: Final = re.compile(r"(.+\.experts)\.(gate_up_proj|gate_proj|up_proj|down_proj)(?:\.weight)?")


class Router(nn.Module):
    """Scores of all experts; never quantized, and whole on every rank.

    Args:
        hidden_size: features of the input.
        num_experts: E.
        top_k: experts that a token goes to.
        normalize: whether the shares of a token's experts sum up to 1.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, normalize: bool, context: LayerContext
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.normalize = normalize
        self._batch_invariant = context.batch_invariant
        weight = torch.empty(num_experts, hidden_size, dtype=context.dtype, device=context.device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._prepared: torch.Tensor | PackedWeight | StreamedWeight = weight

    def finalize_weights(self) -> None:
        """Prepare the weight for the device."""
        self._prepared = pack_linear_weight(self.weight.data, batch_invariant=self._batch_invariant)

    def forward(self, x: torch.Tensor) -> Routing:
        """The experts of tokens [T, hidden_size]."""
        return choose_experts(x, self._prepared, self.top_k, normalize=self.normalize)


class Experts(nn.Module):
    """The experts of one layer, or this rank's part of them.

    Args:
        num_experts: E, of all ranks.
        hidden_size: features of input and output.
        intermediate_size: features inside an expert.
        activation: Hugging Face name of the gate's activation.
        context: names the method and the group.

    Raises:
        InvalidParameterError: the experts, or their features, cannot be divided over the ranks.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, activation: str, context: LayerContext
    ) -> None:
        super().__init__()
        self.group = context.group
        self.activation = activation
        self.intermediate_size = intermediate_size
        self.splits_experts = not context.expert_parallel
        if self.splits_experts:
            self.num_experts = num_experts
            self.rank_features = context.group.shard_size(intermediate_size, "expert features")
            self.first_expert = 0
        else:
            self.num_experts = context.group.shard_size(num_experts, "experts")
            self.rank_features = intermediate_size
            self.first_expert = context.group.rank * self.num_experts
        self.method = context.experts_method(context.prefix)
        self._quantized_method = self.method if isinstance(self.method, TakesQuantizedExpertRows) else None
        sizes = ExpertSizes(self.num_experts, hidden_size, self.rank_features)
        self._filled = self.method.create_weights(self, sizes, context.dtype, context.device)

    def row_form(self, x: torch.Tensor) -> RowForm:
        """The form in which rows like x [T, hidden_size] are best given."""
        return self.method.row_form(x)

    def forward(self, x: torch.Tensor, routing: Routing, quantized: QuantizedRows | None = None) -> Added:
        """[T, hidden_size] to [T, hidden_size], equal on all ranks."""
        if quantized is None:
            added = self.method.apply(x, routing)
        else:
            assert self._quantized_method is not None, "these rows are quantized for another layer"
            added = self._quantized_method.apply_quantized(x, quantized, routing)
        return added if self.group.size == 1 else self.group.all_reduce(summed(added))

    def finalize_weights(self) -> None:
        """Let the method prepare the filled weights."""
        self.method.process_after_loading(self, self.activation, self.first_expert)
        self._filled = {}  # its views would keep weights alive that the method has replaced

    def named_weight_targets(self, prefix: str) -> Iterator[tuple[str, WeightTarget]]:
        """`<expert>.gate_proj`, `.up_proj` and `.down_proj` of every expert of this rank."""
        for local in range(self.num_experts):
            for name, parameter in self._filled.items():
                for projection in PROJECTIONS:
                    full_name = join_name(prefix, f"{self.first_expert + local}.{projection}_proj.{name}")
                    yield full_name, self._target(name, parameter, projection, local)

    def _target(self, name: str, parameter: ExpertParameter, projection: ExpertProjection, local: int) -> WeightTarget:
        stack: torch.Tensor = getattr(parameter, projection)
        destination = stack[local]
        axis = parameter.axes.input if projection == "down" else parameter.axes.output
        shard = None
        if axis is not None and self.rank_features != self.intermediate_size:
            per_element = self.rank_features // destination.shape[axis]
            first = self.group.rank * self.rank_features
            shard = Shard(axis, first // per_element, self.intermediate_size // per_element)
        store = None
        if isinstance(self.method, ConvertsExpertsWhileLoading):
            store = partial(self.method.store, name, projection, local)
        return WeightTarget(destination, shard, store)


class SparseMoe(nn.Module):
    """Router and experts: the feed-forward block of a decoder layer.

    Args:
        hidden_size: features of input and output.
        intermediate_size: features inside an expert.
        num_experts: E.
        top_k: experts that a token goes to.
        activation: Hugging Face name of the gate's activation.
        normalize: whether the shares of a token's experts sum up to 1.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        top_k: int,
        activation: str,
        normalize: bool,
        context: LayerContext,
    ) -> None:
        super().__init__()
        self.gate = Router(hidden_size, num_experts, top_k, normalize=normalize, context=context.child("gate"))
        self.experts = Experts(num_experts, hidden_size, intermediate_size, activation, context.child("experts"))

    def row_form(self, x: torch.Tensor) -> RowForm:
        """Plain rows, which the router reads, or those and quantized ones for the experts."""
        return self.experts.row_form(x)

    def forward(self, x: torch.Tensor | PlainAndQuantized, add_to: torch.Tensor | None = None) -> Added:
        """[T, hidden_size] to [T, hidden_size], which may be left to the norm behind it to add up.

        Nothing is added to `add_to`, unlike in `GatedMLP`.
        """
        x, quantized = x if isinstance(x, PlainAndQuantized) else (x, None)
        return self.experts(x, self.gate(x), quantized)  # type: ignore[no-any-return]


def names_of_stack(name: str, num_experts: int) -> Sequence[str] | None:
    """The tensors of single experts that lie one after the other in the checkpoint tensor `name`; None: it is no stack.

    transformers 5 keeps `experts.gate_up_proj` [E, 2 I, H] and `experts.down_proj` [E, H, I]; GGUF files keep a stack
    for each of the three projections.
    """
    found = _STACKED.fullmatch(name)
    if found is None:
        return None
    prefix, projection = found.groups()
    parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
    return [f"{prefix}.{expert}.{part}.weight" for expert in range(num_experts) for part in parts]
