"""Gated activations of the MLP: the first half of the input, activated, times the second half (SwiGLU, GeGLU:
https://arxiv.org/abs/2002.05202). Called by `layers.mlp` on the output of the merged gate and up projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch.nn import functional

from tokenmill.errors import UnsupportedFeatureError, did_you_mean

GatedActivation: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`; gate_up: [..., 2 I], gate first; returns [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`gelu(gate) * up` with the tanh form of GELU; gate_up: [..., 2 I], gate first; returns [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def silu_and_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The definition of `silu_and_mul`, in float32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1.0 + torch.exp(-gate)) * up).to(gate_up.dtype)


def gelu_tanh_and_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The definition of `gelu_tanh_and_mul`, in float32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    inner = (2.0 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return (0.5 * gate * (1.0 + torch.tanh(inner)) * up).to(gate_up.dtype)


IMPLEMENTATIONS: Mapping[str, Mapping[str, GatedActivation]] = MappingProxyType({
    "silu": MappingProxyType({"reference": silu_and_mul_reference, "torch": silu_and_mul}),
    "gelu_pytorch_tanh": MappingProxyType({"reference": gelu_tanh_and_mul_reference, "torch": gelu_tanh_and_mul}),
})  # fmt: skip
"""By the activation's Hugging Face name, then by implementation."""


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation for tensors of this device and type."""
    return "torch"


def gated_activation(name: str, device: torch.device, dtype: torch.dtype) -> GatedActivation:
    """The gated form of the activation `name` (`hidden_act` of a Hugging Face configuration).

    Raises:
        UnsupportedFeatureError: no such activation (`field` is `hidden_act`).
    """
    if name not in IMPLEMENTATIONS:
        raise UnsupportedFeatureError(
            f"The activation '{name}' is not supported.",
            field="hidden_act",
            remedy=did_you_mean(name, IMPLEMENTATIONS),
        )
    return IMPLEMENTATIONS[name][choose(device, dtype)]
