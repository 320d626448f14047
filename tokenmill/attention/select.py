"""Chooses the attention backend: the only place that knows which device can run which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from tokenmill.attention.base import AttentionBackend
from tokenmill.attention.cpu import CpuAttention
from tokenmill.attention.reference import ReferenceAttention
from tokenmill.errors import InvalidParameterError, UnsupportedFeatureError, did_you_mean


def _triton(*, batch_invariant: bool = False) -> AttentionBackend:
    from tokenmill.attention.triton import TritonAttention

    return TritonAttention(batch_invariant=batch_invariant)


BACKENDS: Mapping[str, Callable[[], AttentionBackend]] = MappingProxyType(
    {"cpu": CpuAttention, "reference": ReferenceAttention, "triton": _triton}
)
"""Backends by name."""


def select_backend(name: str, device: torch.device, *, batch_invariant: bool = False) -> AttentionBackend:
    """A new backend object for one model.

    Args:
        name: a name in `BACKENDS`, or `auto` for the fastest that the device has.
        device: where the model runs.
        batch_invariant: give a token the same bits in any company.

    Raises:
        InvalidParameterError: no such backend, or not on this device (`field` is `attn_backend`).
        UnsupportedFeatureError: the backend cannot be invariant.
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
    if batch_invariant:
        if name != "triton":
            raise UnsupportedFeatureError(
                f"The attention backend '{name}' does not compute a token in the same way in every batch.",
                field="deterministic",
                remedy="Leave attn_backend at 'auto', or deterministic at False.",
            )
        return _triton(batch_invariant=True)
    return BACKENDS[name]()
