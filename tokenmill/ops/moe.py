"""Mixture of experts: which experts take a token, and the sum of what they make of it (https://arxiv.org/abs/1701.06538).

`route` turns a router's logits into experts and their shares; `run_experts` computes the gated MLPs of the chosen
experts and adds them up. On a CPU tokens are grouped by expert, one product for each; on a GPU a few tokens read just
the weights of their experts, and many are sorted by expert on the device and multiplied tile by tile, without the host
knowing who went where. Called by `layers.moe` through `quantization`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import torch

from tokenmill.ops import captured
from tokenmill.ops.activation import gated_activation
from tokenmill.ops.expert_sum import PendingSum, summed
from tokenmill.ops.fp8 import (
    FP8_DTYPE,
    QuantizedRows,
    per_token_quantize_reference,
    static_quantize_reference,
)
from tokenmill.ops.linear import PackedWeight, StreamedWeight, linear, pack_linear_weight
from tokenmill.ops.moe_plan import (
    INVARIANT_PLAN,
    MAX_PAIR_TOKENS,
    SCALE_GROUP,
    down_pair_plan,
    gate_up_pair_plan,
    grouped_plan,
    scales_inner_by_token,
)

PackedMatrices: TypeAlias = tuple[torch.Tensor | PackedWeight | StreamedWeight, ...]


class Routing(NamedTuple):
    """The K experts of each of T tokens: experts [T, K] int32, and their shares in the sum, weights [T, K] float32."""

    experts: torch.Tensor
    weights: torch.Tensor


class ExpertMatrix(NamedTuple):
    """The same projection of E experts.

    Args:
        values: [E, O, I], of the model's type or float8_e4m3fn, contiguous.
        scales: for float8: [E, O] float32, a factor for each output feature, or [E, ceil(O / 128), ceil(I / 128)], a
            factor for each block of 128 x 128; None: ones.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def is_block_scaled(self) -> bool:
        """Whether there is a factor for each block."""
        return self.scales is not None and self.scales.dim() == 3

    def dequantized(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """[O, I] of one expert in `dtype`."""
        values = self.values[expert]
        if self.scales is None:
            return values.to(dtype)
        if not self.is_block_scaled:
            return (values.float() * self.scales[expert][:, None]).to(dtype)
        factors = self.scales[expert].repeat_interleave(SCALE_GROUP, 0).repeat_interleave(SCALE_GROUP, 1)
        return (values.float() * factors[: values.shape[0], : values.shape[1]]).to(dtype)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The weights of E gated experts: `down(activation(gate(x)) * up(x))`.

    Args:
        gate_up: [E, 2 I, H], the gate's I output features first.
        down: [E, H, I].
        activation: Hugging Face name of the gate's activation.
        first_expert: the routing's number of the first expert here; what is routed elsewhere adds nothing.
        input_scales: (of x, of what is between the projections), [1] float32 each, if a checkpoint of float8 gives
            them; None: every row is quantized with a scale of its own.
        packed: (gate_up, down) of each expert prepared for a CPU's products, in the place of the two, which are then
            empty; None: not prepared.
        batch_invariant: give each token the same bits in any company: one way for all numbers of tokens.
    """

    gate_up: ExpertMatrix
    down: ExpertMatrix
    activation: str = "silu"
    first_expert: int = 0
    input_scales: tuple[torch.Tensor, torch.Tensor] | None = None
    packed: tuple[PackedMatrices, PackedMatrices] | None = None
    batch_invariant: bool = False

    @property
    def num_experts(self) -> int:
        """E."""
        return self.gate_up.values.shape[0]

    def scales_inner_by_token(self, num_pairs: int) -> bool:
        """Whether what is between the projections of so many pairs has one scale a row, not one for 128 features."""
        has_feature_scales = self.down.scales is not None and not self.down.is_block_scaled
        is_static = self.input_scales is not None
        by_token = not self.batch_invariant and scales_inner_by_token(num_pairs, self.num_experts)
        return is_static or (has_feature_scales and by_token)

    def takes_quantized(self, num_rows: int) -> bool:
        """Whether `run_experts` quantizes so many rows, each with a scale of its own."""
        is_dynamic = self.gate_up.values.dtype == FP8_DTYPE and self.input_scales is None
        is_tiled = self.batch_invariant or num_rows > MAX_PAIR_TOKENS
        return is_dynamic and not self.gate_up.is_block_scaled and is_tiled

    def prepared(self) -> ExpertWeights:
        """These weights as the products of their device want them; the originals may be freed."""
        device, dtype = self.gate_up.values.device, self.gate_up.values.dtype
        if device.type != "cpu" or dtype == FP8_DTYPE:
            return self
        packed = tuple(pack_linear_weight(matrix) for matrix in self.gate_up.values)
        if not isinstance(packed[0], PackedWeight):
            return self
        packed_down = tuple(pack_linear_weight(matrix) for matrix in self.down.values)
        num_experts = self.num_experts
        return ExpertWeights(
            ExpertMatrix(self.gate_up.values.new_empty(num_experts, 0, 0)),
            ExpertMatrix(self.down.values.new_empty(num_experts, 0, 0)),
            self.activation,
            self.first_expert,
            packed=(packed, packed_down),
        )


def route(logits: torch.Tensor, top_k: int, *, normalize: bool) -> Routing:
    """The `top_k` most likely experts of each token.

    Args:
        logits: [T, E].
        top_k: K, at most E.
        normalize: divide the K probabilities by their sum.

    Returns:
        Experts by falling probability, and their probabilities; softmax over all experts, in float32.
    """
    if logits.is_meta:
        return Routing(*captured.route(logits, top_k, normalize))
    return ROUTE_IMPLEMENTATIONS[choose(logits.device, logits.dtype)](logits, top_k, normalize)


def run_experts(
    x: torch.Tensor, routing: Routing, weights: ExpertWeights, quantized: QuantizedRows | None = None
) -> torch.Tensor:
    """The experts' outputs, times their shares, added up.

    With float8 weights up to `MAX_PAIR_TOKENS` tokens are multiplied as they are. More are quantized: by
    `weights.input_scales` if there are any; else x with a scale for each token (for each 128 features if the weights
    are block-scaled), what is between the projections with a scale for each token and 128 features, or, where that
    would be slow, for each token.

    Args:
        x: [T, H].
        routing: of the T tokens.
        weights: of the experts that this rank holds.
        quantized: x with a scale for each row, if it is at hand and `weights.takes_quantized(T)`.

    Returns:
        [T, H], of x's type; summed in float32, in the order of the routing.
    """
    return summed(expert_products(x, routing, weights, quantized))


def expert_products(
    x: torch.Tensor, routing: Routing, weights: ExpertWeights, quantized: QuantizedRows | None = None
) -> torch.Tensor | PendingSum:
    """`run_experts`, the sum left to what follows where that is faster."""
    return EXPERTS_IMPLEMENTATIONS[choose(x.device, x.dtype)](x, routing, weights, quantized)


def route_reference(logits: torch.Tensor, top_k: int, normalize: bool) -> Routing:
    """The definition; of equal probabilities any may come first."""
    weights, experts = logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(experts.int(), weights)


def route_triton(logits: torch.Tensor, top_k: int, normalize: bool) -> Routing:
    """One launch: softmax, selection and division."""
    from tokenmill.ops.triton import moe_routing as kernels

    return Routing(*kernels.route(logits, top_k, normalize))


def run_experts_reference(
    x: torch.Tensor, routing: Routing, weights: ExpertWeights, quantized: QuantizedRows | None = None
) -> torch.Tensor:
    """The definition, one token and expert after the other, in float32."""
    activation = gated_activation(weights.activation, torch.device("cpu"), torch.float32)
    quantizes = weights.gate_up.values.dtype == FP8_DTYPE and x.shape[0] > MAX_PAIR_TOKENS
    inputs = _rounded_input(x, weights, quantized) if quantizes else x
    num_pairs = routing.experts.numel()
    out = torch.zeros(x.shape[0], x.shape[1], dtype=torch.float32, device=x.device)
    for token, (experts, shares) in enumerate(zip(routing.experts.tolist(), routing.weights, strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            local = expert - weights.first_expert
            if 0 <= local < weights.num_experts:
                gate_up = weights.gate_up.dequantized(local, torch.float32) @ inputs[token].float()
                inner = activation(gate_up[None])
                inner = _rounded_inner(inner, x.dtype, weights, num_pairs) if quantizes else inner.to(x.dtype).float()
                out[token] += share * (weights.down.dequantized(local, torch.float32) @ inner[0])
    return out.to(x.dtype)


def run_experts_torch(
    x: torch.Tensor, routing: Routing, weights: ExpertWeights, quantized: QuantizedRows | None = None
) -> torch.Tensor:
    """Tokens sorted by expert; two products for each expert that has any. The host reads how many each has."""
    num_tokens, top_k = routing.experts.shape
    num_experts = weights.num_experts
    if num_tokens == 0:
        return x.clone()
    local = routing.experts.flatten().long() - weights.first_expert
    local = torch.where((local >= 0) & (local < num_experts), local, num_experts)  # elsewhere: behind the last one
    order = local.argsort(stable=True)
    counts = local.bincount(minlength=num_experts + 1)[:num_experts].tolist()
    is_float8 = weights.gate_up.values.dtype == FP8_DTYPE
    quantizes = is_float8 and (weights.batch_invariant or num_tokens > MAX_PAIR_TOKENS)
    inputs = _rounded_input(x, weights, quantized) if quantizes else x
    rows = inputs[order[: sum(counts)] // top_k]
    activation = gated_activation(weights.activation, x.device, rows.dtype)
    outputs = [rows.new_empty(0, x.shape[1])]
    for expert, group in enumerate(torch.split(rows, counts)):
        if group.shape[0]:
            gate_up, down = _matrices(weights, expert, group.dtype)
            inner = activation(linear(group, gate_up))
            if quantizes:
                inner = _rounded_inner(inner, x.dtype, weights, num_tokens * top_k)
            outputs.append(linear(inner, down))
    of_pairs = torch.zeros(num_tokens * top_k, x.shape[1], dtype=torch.float32, device=x.device)
    of_pairs[order[: sum(counts)]] = torch.cat(outputs).float()
    return (of_pairs.view(num_tokens, top_k, -1) * routing.weights[:, :, None]).sum(dim=1).to(x.dtype)


def run_experts_triton(
    x: torch.Tensor, routing: Routing, weights: ExpertWeights, quantized: QuantizedRows | None = None
) -> torch.Tensor | PendingSum:
    """Few tokens: a matrix-vector product for each token and expert. Many: tiles of one expert's tokens."""
    if x.shape[0] == 0:
        return torch.empty_like(x)
    rows = x if x.stride(1) == 1 else x.contiguous()
    if x.shape[0] <= MAX_PAIR_TOKENS and not weights.batch_invariant:
        from tokenmill.ops.triton.moe_pairs import run_pairs

        hidden, size = weights.down.values.shape[1:]
        return run_pairs(rows, routing, weights, gate_up_pair_plan(size, hidden), down_pair_plan(hidden, size))
    from tokenmill.ops.triton.moe_layer import tile_products

    num_pairs = routing.experts.numel()
    plan = INVARIANT_PLAN if weights.batch_invariant else grouped_plan(num_pairs, weights.num_experts)
    return tile_products(rows, routing, weights, plan, quantized)


def quantize_groups_fp8(x: torch.Tensor) -> QuantizedRows:
    """Quantize x [T, D] with a scale for each 128 features: values [T, D], scales [T, ceil(D / 128)]."""
    if choose(x.device, x.dtype) == "triton":
        from tokenmill.ops.triton.moe_scales import quantize_groups

        return QuantizedRows(*quantize_groups(x))
    num_rows, size = x.shape
    num_groups = -(-size // SCALE_GROUP)
    padded = torch.nn.functional.pad(x.float(), (0, num_groups * SCALE_GROUP - size))
    quantized = per_token_quantize_reference(padded.view(-1, SCALE_GROUP))
    values = quantized.values.view(num_rows, num_groups * SCALE_GROUP)[:, :size].contiguous()
    return QuantizedRows(values, quantized.scales.view(num_rows, num_groups))


def _matrices(
    weights: ExpertWeights, expert: int, dtype: torch.dtype
) -> tuple[torch.Tensor | PackedWeight | StreamedWeight, torch.Tensor | PackedWeight | StreamedWeight]:
    if weights.packed is not None:
        return weights.packed[0][expert], weights.packed[1][expert]
    return weights.gate_up.dequantized(expert, dtype), weights.down.dequantized(expert, dtype)


def _dequantized(rows: QuantizedRows) -> torch.Tensor:
    """[T, D] float32."""
    return rows.values.float() * rows.scales[:, None]


def _rounded_input(x: torch.Tensor, weights: ExpertWeights, quantized: QuantizedRows | None) -> torch.Tensor:
    """[T, H] float32: quantized as the first product takes it, and back."""
    if quantized is not None:
        return _dequantized(quantized)
    if weights.input_scales is not None:
        return _dequantized(static_quantize_reference(x, weights.input_scales[0]))
    return _rounded_groups(x) if weights.gate_up.is_block_scaled else _dequantized(per_token_quantize_reference(x))


def _rounded_inner(inner: torch.Tensor, dtype: torch.dtype, weights: ExpertWeights, num_pairs: int) -> torch.Tensor:
    """[rows, I] float32: quantized as the second product takes it, and back."""
    if weights.input_scales is not None:
        return _dequantized(static_quantize_reference(inner.to(dtype), weights.input_scales[1]))
    if weights.scales_inner_by_token(num_pairs):
        return _dequantized(per_token_quantize_reference(inner.to(dtype)))
    return _rounded_groups(inner)


def _rounded_groups(x: torch.Tensor) -> torch.Tensor:
    """[T, D] float32: quantized by `quantize_groups_fp8`, and back."""
    values, scales = quantize_groups_fp8(x)
    factors = scales.repeat_interleave(SCALE_GROUP, 1)[:, : values.shape[1]]
    return values.float() * factors


ROUTE_IMPLEMENTATIONS: Mapping[str, Callable[[torch.Tensor, int, bool], Routing]] = MappingProxyType(
    {"reference": route_reference, "torch": route_reference, "triton": route_triton}
)
EXPERTS_IMPLEMENTATIONS: Mapping[
    str, Callable[[torch.Tensor, Routing, ExpertWeights, QuantizedRows | None], torch.Tensor | PendingSum]
] = (
    MappingProxyType({
        "reference": run_experts_reference,
        "torch": run_experts_torch,
        "triton": run_experts_triton,
    })
)  # fmt: skip


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation for tensors of this device and type."""
    is_kernel_type = dtype in (torch.bfloat16, torch.float16, torch.float32)
    return "triton" if device.type == "cuda" and is_kernel_type else "torch"
