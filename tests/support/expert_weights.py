"""Random experts and routings for tests of mixture-of-experts layers and kernels."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from tokenmill.ops.fp8 import per_token_quantize_reference
from tokenmill.ops.moe import ExpertMatrix, ExpertWeights, Routing, route_reference
from tokenmill.ops.moe_plan import SCALE_GROUP

WeightKind: TypeAlias = Literal["plain", "features", "blocks"]


def random_routing(num_tokens: int, num_experts: int, top_k: int, device: str = "cpu", seed: int = 0) -> Routing:
    """Different for every token; expert 0 is nobody's, the last one everybody's, if there are enough experts."""
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    if num_experts > top_k:
        logits[:, 0], logits[:, -1] = -10.0, 10.0
    routing = route_reference(logits, top_k, normalize=False)
    return Routing(routing.experts.to(device), routing.weights.to(device))


def random_experts(
    num_experts: int,
    hidden: int,
    size: int,
    dtype: torch.dtype,
    kind: WeightKind = "plain",
    device: str = "cpu",
    activation: str = "silu",
) -> ExpertWeights:
    """Experts with weights of the size that keeps activations near 1."""
    generator = torch.Generator(device=device).manual_seed(1)

    def matrix(out_features: int, in_features: int) -> ExpertMatrix:
        values = torch.randn(num_experts, out_features, in_features, generator=generator, device=device)
        return quantized_matrix(values * in_features**-0.5, dtype, kind)

    return ExpertWeights(matrix(2 * size, hidden), matrix(hidden, size), activation)


def quantized_matrix(values: torch.Tensor, dtype: torch.dtype, kind: WeightKind) -> ExpertMatrix:
    """[E, O, I] in `dtype`, or in float8 with scales."""
    num_experts, out_features, in_features = values.shape
    if kind == "plain":
        return ExpertMatrix(values.to(dtype))
    if kind == "features":
        rows = per_token_quantize_reference(values.flatten(0, 1))
        return ExpertMatrix(rows.values.view(values.shape), rows.scales.view(num_experts, out_features))
    counts = -(-out_features // SCALE_GROUP), -(-in_features // SCALE_GROUP)
    scales = torch.rand(num_experts, *counts, device=values.device) * 0.01 + 0.002
    factors = scales.repeat_interleave(SCALE_GROUP, 1).repeat_interleave(SCALE_GROUP, 2)
    quantized = (values / factors[:, :out_features, :in_features]).clamp(-448, 448)
    return ExpertMatrix(quantized.to(torch.float8_e4m3fn), scales)
