"""Chooses the attention backend: the only place that knows which device can run which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from tokenmill.attention.base import AttentionBackend
from tokenmill.attention.cpu import CpuAttention
from tokenmill.attention.reference import ReferenceAttention
from tokenmill.errors import InvalidParameterError, did_you_mean

BACKENDS: Mapping[str, Callable[[], AttentionBackend]] = MappingProxyType(
    {"cpu": CpuAttention, "reference": ReferenceAttention}
)
"""Backends by name."""


def select_backend(name: str, device: torch.device) -> AttentionBackend:
    """A new backend object for one model.

    Args:
        name: a name in `BACKENDS`, or `auto` for the fastest that the device has.
        device: where the model runs.

    Raises:
        InvalidParameterError: no such backend (`field` is `attn_backend`).
    """
    if name == "auto":
        name = "cpu"  # plain torch operations: the only fast backend yet, on every device
    if name not in BACKENDS:
        raise InvalidParameterError(
            f"There is no attention backend '{name}'.",
            field="attn_backend",
            remedy=did_you_mean(name, ("auto", *BACKENDS)),
        )
    return BACKENDS[name]()
