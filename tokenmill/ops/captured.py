"""Ops of tensors on the meta device, which have no values: each is one opaque call `tokenmill::<name>`.

`builder.capture` runs a model on the meta device and reads these calls from what it records; there is nothing to
compute. The typed functions of `ops` come here by themselves when they are given such a tensor.
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("tokenmill", "DEF")  # type: ignore[no-untyped-call]
"""Registers the ops with torch, once in a process; they live as long as this object."""


def _like_first(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _rotation(positions: torch.Tensor, frequencies: list[float], factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (positions.shape[0], 1, 2 * len(frequencies))
    return (
        torch.empty(shape, dtype=torch.float32, device=positions.device),
        torch.empty(shape, dtype=torch.float32, device=positions.device),
    )


def _gated_activation(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _route(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return (
        torch.empty(shape, dtype=torch.int32, device=logits.device),
        torch.empty(shape, dtype=torch.float32, device=logits.device),
    )


for _schema, _implementation in (
    ("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear),
    ("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _like_first),
    ("apply_rope(Tensor x, Tensor cos, Tensor signed_sin) -> Tensor", _like_first),
    ("rotation(Tensor positions, float[] frequencies, float factor) -> (Tensor, Tensor)", _rotation),
    ("gated_activation(Tensor gate_up, str activation) -> Tensor", _gated_activation),
    ("soft_cap(Tensor x, float cap) -> Tensor", _like_first),
    ("route(Tensor logits, int top_k, bool normalize) -> (Tensor, Tensor)", _route),
    (
        "experts(Tensor x, Tensor experts, Tensor shares, Tensor gate_up, Tensor down, str activation) -> Tensor",
        _like_first,
    ),
    (
        "attention(Tensor query, Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, float scale, "
        "int? sliding_window, float? soft_cap) -> Tensor",
        _like_first,
    ),
):
    LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(_schema.partition("(")[0], _implementation, "Meta")  # type: ignore[no-untyped-call]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`ops.linear.linear`."""
    product: torch.Tensor = torch.ops.tokenmill.linear(x, weight, bias)
    return product


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`ops.rms_norm.rms_norm`."""
    normalized: torch.Tensor = torch.ops.tokenmill.rms_norm(x, weight, eps)
    return normalized


def apply_rope(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """`ops.rope.apply_rope`."""
    turned: torch.Tensor = torch.ops.tokenmill.apply_rope(x, cos, signed_sin)
    return turned


def rotation(positions: torch.Tensor, frequencies: list[float], factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What `layers.rope.RotaryEmbedding` computes: cosines and signed sines, [T, 1, D] each."""
    cos, signed_sin = torch.ops.tokenmill.rotation(positions, frequencies, factor)
    return cos, signed_sin


def gated_activation(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """The function that `ops.activation.gated_activation` finds, of gate and up side by side."""
    gated: torch.Tensor = torch.ops.tokenmill.gated_activation(gate_up, activation)
    return gated


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """`ops.soft_cap.soft_cap`."""
    capped: torch.Tensor = torch.ops.tokenmill.soft_cap(x, cap)
    return capped


def route(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.moe.route`: experts and shares, [T, top_k] each."""
    experts, shares = torch.ops.tokenmill.route(logits, top_k, normalize)
    return experts, shares
