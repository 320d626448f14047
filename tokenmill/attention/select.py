"""Chooses the attention backend: the only place that knows which device can run which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from tokenmill.attention.base import AttentionBackend
from tokenmill.attention.cpu import CpuAttention
from tokenmill.attention.reference import ReferenceAttention
from tokenmill.errors import InvalidParameterError, did_you_mean


def _triton() -> AttentionBackend:
    from tokenmill.attention.triton import TritonAttention

    return TritonAttention()


BACKENDS: Mapping[str, Callable[[], AttentionBackend]] = MappingProxyType(
    {"cpu": CpuAttention, "reference": ReferenceAttention, "triton": _triton}
)
"""Backends by name."""


def select_backend(name: str, device: torch.device) -> AttentionBackend:
    """A new backend object for one model.

    Args:
        name: a name in `BACKENDS`, or `auto` for the fastest that the device has.
        device: where the model runs.

    Raises:
        InvalidParameterError: no such backend, or not on this device (`field` is `attn_backend`).
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" else "cpu"
    if name not in BACKENDS:
        raise InvalidParameterError(
            f"There is no attention backend '{name}'.",
            field="attn_backend",
            remedy=did_you_mean(name, ("auto", *BACKENDS)),
        )
    if name == "triton" and device.type != "cuda":
        raise InvalidParameterError(
            f"The attention backend 'triton' does not run on the device '{device.type}'.",
            field="attn_backend",
            remedy="Use 'auto' or 'cpu', or run the model on an NVIDIA GPU.",
        )
    return BACKENDS[name]()
