"""Chooses the attention backend: the only place that knows which device can run which."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from tokenmill.attention.base import AttentionBackend
from tokenmill.attention.cpu import CpuAttention
from tokenmill.attention.reference import ReferenceAttention
from tokenmill.errors import InvalidParameterError, UnsupportedFeatureError, did_you_mean

logger = logging.getLogger(__name__)


def _triton(*, batch_invariant: bool = False) -> AttentionBackend:
    from tokenmill.attention.triton import TritonAttention

    return TritonAttention(batch_invariant=batch_invariant)


def _flashinfer() -> AttentionBackend:
    from tokenmill.attention.flashinfer import FlashInferAttention

    return FlashInferAttention()


BACKENDS: Mapping[str, Callable[[], AttentionBackend]] = MappingProxyType(
    {"cpu": CpuAttention, "flashinfer": _flashinfer, "reference": ReferenceAttention, "triton": _triton}
)
"""Backends by name."""

GPU_BACKENDS = ("flashinfer", "triton")
"""They run on GPUs alone."""

FLASHINFER_HEAD_DIMS = (64, 128, 256)


def select_backend(name: str, device: torch.device, *, batch_invariant: bool = False) -> AttentionBackend:
    """A new backend object for one model.

    Args:
        name: a name in `BACKENDS`, or `auto` for the fastest that the device has.
        device: where the model runs.
        batch_invariant: give a token the same bits in any company.

    Raises:
        InvalidParameterError: no such backend, or not on this device (`field` is `attn_backend`).
        UnsupportedFeatureError: the backend cannot be invariant, or its package is not installed.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" else "cpu"
    if name not in BACKENDS:
        raise InvalidParameterError(
            f"There is no attention backend '{name}'.",
            field="attn_backend",
            remedy=did_you_mean(name, ("auto", *BACKENDS)),
        )
    if name in GPU_BACKENDS and device.type != "cuda":
        raise InvalidParameterError(
            f"The attention backend '{name}' does not run on the device '{device.type}'.",
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


def check_backend(name: str, *, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Refuse a model that the backend `name` cannot attend in; nothing is left to another backend silently.

    Args:
        name: of a backend, not `auto`.
        head_dim: columns of a head.
        dtype: of queries.
        cache_dtype: of the cache.

    Raises:
        UnsupportedFeatureError: `field` is what has to change.
    """
    if name != "flashinfer":
        return
    kind = str(dtype).removeprefix("torch.")
    for is_wrong, problem, field, remedy in (
        (
            dtype not in (torch.float16, torch.bfloat16),
            f"does not compute in {kind}",
            "dtype",
            "Use dtype='bfloat16' or 'float16'",
        ),
        (
            cache_dtype not in (dtype, torch.float8_e4m3fn),
            f"reads no cache of {str(cache_dtype).removeprefix('torch.')} for a model in {kind}",
            "kv_cache_config.dtype",
            "Use 'auto' or 'fp8' for it",
        ),
        (
            head_dim not in FLASHINFER_HEAD_DIMS,
            f"has kernels for heads of {', '.join(map(str, FLASHINFER_HEAD_DIMS))} columns, not of {head_dim}",
            "attn_backend",
            "Use 'triton'",
        ),
    ):
        if is_wrong:
            raise UnsupportedFeatureError(
                f"The attention backend 'flashinfer' {problem}.",
                field=field,
                remedy=f"{remedy}, or leave attn_backend at 'auto'.",
            )


def captures_graphs(name: str, *, wanted: bool) -> bool:
    """Whether decode steps on a GPU shall be captured in CUDA graphs: if `wanted` and the backend `name` allows it.

    `flashinfer` plans every step on the host, which is said in the log; `reference` and `cpu` read its lengths there.
    """
    if wanted and name == "flashinfer":
        logger.warning("Steps run without CUDA graphs: FlashInfer plans each of them on the host.")
    return wanted and name == "triton"
