"""Gated activations of the MLP: the first half of the input, activated, times the second half (SwiGLU, GeGLU:
https://arxiv.org/abs/2002.05202). Called by `layers.mlp` on the output of the merged gate and up projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch.nn import functional

from tokenmill.errors import UnsupportedFeatureError, did_you_mean
from tokenmill.ops import captured
from tokenmill.ops.fp8 import QuantizedRows, per_token_quantize_fp8

GatedActivation: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
QuantizedActivation: TypeAlias = Callable[[torch.Tensor], QuantizedRows]


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`; gate_up: [..., 2 I], gate first; returns [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`gelu(gate) * up` with the tanh form of GELU; gate_up: [..., 2 I], gate first; returns [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def silu_and_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """One pass, in float32."""
    from tokenmill.ops.triton import activation as kernels

    return kernels.silu_and_mul(gate_up)


def gelu_tanh_and_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """One pass, in float32."""
    from tokenmill.ops.triton import activation as kernels

    return kernels.gelu_tanh_and_mul(gate_up)


def silu_and_mul_fp8_triton(gate_up: torch.Tensor) -> QuantizedRows:
    """One pass, quantization included."""
    from tokenmill.ops.triton import activation as kernels

    return QuantizedRows(*kernels.silu_and_mul_fp8(gate_up))


def gelu_tanh_and_mul_fp8_triton(gate_up: torch.Tensor) -> QuantizedRows:
    """One pass, quantization included."""
    from tokenmill.ops.triton import activation as kernels

    return QuantizedRows(*kernels.gelu_tanh_and_mul_fp8(gate_up))


def silu_and_mul_fp8(gate_up: torch.Tensor) -> QuantizedRows:
    """`silu_and_mul`, then `per_token_quantize_fp8`."""
    return per_token_quantize_fp8(silu_and_mul(gate_up))


def gelu_tanh_and_mul_fp8(gate_up: torch.Tensor) -> QuantizedRows:
    """`gelu_tanh_and_mul`, then `per_token_quantize_fp8`."""
    return per_token_quantize_fp8(gelu_tanh_and_mul(gate_up))


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
    "silu": MappingProxyType({
        "reference": silu_and_mul_reference,
        "torch": silu_and_mul,
        "triton": silu_and_mul_triton,
    }),
    "gelu_pytorch_tanh": MappingProxyType({
        "reference": gelu_tanh_and_mul_reference,
        "torch": gelu_tanh_and_mul,
        "triton": gelu_tanh_and_mul_triton,
    }),
})  # fmt: skip
"""By the activation's Hugging Face name, then by implementation."""

FP8_IMPLEMENTATIONS: Mapping[str, Mapping[str, QuantizedActivation]] = MappingProxyType({
    "silu": MappingProxyType({"torch": silu_and_mul_fp8, "triton": silu_and_mul_fp8_triton}),
    "gelu_pytorch_tanh": MappingProxyType({"torch": gelu_tanh_and_mul_fp8, "triton": gelu_tanh_and_mul_fp8_triton}),
})  # fmt: skip
"""The same, quantized to float8 for each token: from [T, 2 I]."""


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation for tensors of this device and type."""
    return "triton" if device.type == "cuda" else "torch"


def gated_activation(name: str, device: torch.device, dtype: torch.dtype) -> GatedActivation:
    """The gated form of the activation `name` (`hidden_act` of a Hugging Face configuration).

    Raises:
        UnsupportedFeatureError: no such activation (`field` is `hidden_act`).
    """
    _check(name)
    if device.type == "meta":
        return partial(captured.gated_activation, activation=name)
    return IMPLEMENTATIONS[name][choose(device, dtype)]


def gated_activation_fp8(name: str, device: torch.device, dtype: torch.dtype) -> QuantizedActivation:
    """`gated_activation` with its result quantized: [T, 2 I] to rows of [T, I].

    Raises:
        UnsupportedFeatureError: no such activation (`field` is `hidden_act`).
    """
    _check(name)
    return FP8_IMPLEMENTATIONS[name][choose(device, dtype)]


def _check(name: str) -> None:
    if name not in IMPLEMENTATIONS:
        raise UnsupportedFeatureError(
            f"The activation '{name}' is not supported.",
            field="hidden_act",
            remedy=did_you_mean(name, IMPLEMENTATIONS),
        )
