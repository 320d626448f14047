"""`choose_backend`: what runs a model, and why it is not the other. The only place that resolves `LlmArgs.backend`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final, Literal, NamedTuple

import torch

from tokenmill.config import LlmArgs
from tokenmill.errors import InvalidParameterError, UnsupportedFeatureError
from tokenmill.models.config import ModelConfig

ENGINE_QUANTIZATIONS: Final = ("int8", "int8_channel", "q4_0", "q4_1", "q5_0", "q8_0")
"""Formats of `LlmArgs.quantization` that the builder makes."""


class BackendChoice(NamedTuple):
    """The backend, and why it is not `engine`; None if it is, or if the caller asked for torch."""

    name: Literal["engine", "torch"]
    reason: str | None = None


def choose_backend(
    args: LlmArgs, device: torch.device, model: ModelConfig, *, has_fp8_weights: bool = False
) -> BackendChoice:
    """Resolve `args.backend`: `auto` is the compiled engine on a CPU, where it can run the model, and torch on a GPU.

    Args:
        args, device, model: what is to run, and where.
        has_fp8_weights: whether the checkpoint's weights are float8 with scales.

    Raises:
        UnsupportedFeatureError: the caller asked for a backend that cannot do what else was asked for.
    """
    of_engines = _options_of_engines(args)
    if args.backend in ("torch", "pytorch"):
        for name in of_engines:
            raise UnsupportedFeatureError(
                f"build_config.{name} is of built engines, and the backend is torch.",
                field=name,
                remedy="Leave it out, or use backend='engine'.",
            )
        if args.quantization in ENGINE_QUANTIZATIONS:
            raise UnsupportedFeatureError(
                f"The torch backend does not quantize to '{args.quantization}'.",
                field="quantization",
                remedy="Use backend='engine', or quantization='fp8'.",
            )
        return BackendChoice("torch")
    reason = "weights of float8 cannot be compiled" if has_fp8_weights else _reason_against_engine(args, device, model)
    if args.backend == "engine" or args.quantization in ENGINE_QUANTIZATIONS or of_engines:
        if reason is not None:
            raise UnsupportedFeatureError(
                f"The engine backend cannot be used: {reason}.", field="backend", remedy="Use backend='torch'."
            )
        return BackendChoice("engine")
    if device.type != "cpu":
        return BackendChoice("torch")
    return BackendChoice("engine") if reason is None else BackendChoice("torch", reason)


def check_built_engine(args: LlmArgs, *, device: str, dtype: str, quantization: str) -> None:
    """Refuse arguments that ask for another engine than the built one that `args.model` names.

    Args:
        args: how to serve.
        device, dtype, quantization: of the engine, as its configuration says.

    Raises:
        UnsupportedFeatureError: the torch backend, or random weights.
        InvalidParameterError: other formats than the engine's.
    """
    if args.backend in ("torch", "pytorch"):
        raise UnsupportedFeatureError(
            "A built engine cannot run on the torch backend.",
            field="backend",
            remedy="Leave the backend out, or give the checkpoint instead of the engine.",
        )
    for name in _options_of_engines(args):
        raise InvalidParameterError(
            f"build_config.{name} is for a build, and the model is an engine that has been built.",
            field=name,
            remedy="Leave it out, or give the checkpoint instead of the engine.",
        )
    if args.load_format == "dummy":
        raise UnsupportedFeatureError(
            "A built engine has its own weights.", field="load_format", remedy="Leave load_format out."
        )
    if args.attn_backend != "auto" and device == "cpu":
        raise UnsupportedFeatureError(
            "Engines for a CPU have attention kernels of their own.",
            field="attn_backend",
            remedy="Leave attn_backend out, or give the checkpoint and backend='torch'.",
        )
    wanted = {"int8": "int8_group32"}.get(args.quantization or "", args.quantization)
    if wanted is not None and wanted != quantization.partition("+")[0]:
        raise InvalidParameterError(
            f"The engine's weights are {'not quantized' if quantization == 'none' else quantization}, "
            f"and '{args.quantization}' is asked for.",
            field="quantization",
            remedy=f"Leave it out, or build an engine with quantization='{args.quantization}'.",
        )
    if args.dtype not in ("auto", dtype):
        raise InvalidParameterError(
            f"The engine's dtype is {dtype}, and '{args.dtype}' is asked for.",
            field="dtype",
            remedy=f"Leave it out, or build an engine with dtype='{args.dtype}'.",
        )


def _options_of_engines(args: LlmArgs) -> list[str]:
    return [] if args.build_config is None else list(args.build_config.options_of_engines())


def _reason_against_engine(args: LlmArgs, device: torch.device, model: ModelConfig) -> str | None:
    """Why the engine backend cannot do what is asked for; None if it can."""
    for problem, reason in (
        (args.load_format == "dummy", "load_format='dummy' has no weights to build from"),
        (args.quantization == "fp8", "quantization='fp8' is of the torch backend"),
        (args.dtype == "float16", "engines have no float16"),
        (args.kv_cache_config.dtype not in ("auto", "float32", "bfloat16"), "its cache is float32 or bfloat16"),
        (args.attn_backend != "auto", f"attn_backend='{args.attn_backend}' is of the torch backend"),
    ):
        if problem:
            return reason
    if device.type != "cpu":
        return None
    if find_spec("llvmlite") is None:
        return "its kernels need the package llvmlite"
    if model.head_dim % 8 or model.head_dim > 256:
        return f"its kernels cannot attend with heads of {model.head_dim} columns"
    return None
