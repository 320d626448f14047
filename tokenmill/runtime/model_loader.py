"""From a checkpoint to a model in memory, ready to run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Literal

import torch

from tokenmill.attention.base import AttentionBackend
from tokenmill.checkpoints.base import Checkpoint
from tokenmill.checkpoints.loading import fill_dummy, load_weights, named_tensors
from tokenmill.config import LlmArgs
from tokenmill.errors import CheckpointError, InvalidParameterError, UnsupportedFeatureError
from tokenmill.layers.attention import Attention
from tokenmill.layers.context import LayerContext
from tokenmill.layers.weights import finalize_weights, weight_targets
from tokenmill.models import load_model_class
from tokenmill.models.base import CausalLM
from tokenmill.models.config import ModelConfig
from tokenmill.ops.platform import computes_bfloat16
from tokenmill.quantization.checkpoint_format import read_format
from tokenmill.quantization.select import methods_for

_CACHE_SCALE: Final = re.compile(r"(.*\.self_attn)\.(?:.+\.)?([kv])_scale")


def resolve_device(name: str) -> torch.device:
    """The device that `LlmArgs.device` means.

    Raises:
        InvalidParameterError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidParameterError(
            f"'{name}' is not a device.", field="device", remedy="Use 'cpu', 'cuda' or 'cuda:N'."
        ) from None
    if device.type == "cuda":
        index = device.index or 0
        if index >= torch.cuda.device_count():
            raise InvalidParameterError(
                f"There is no GPU {index} here ({torch.cuda.device_count()} found).", field="device"
            )
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise InvalidParameterError(f"Device '{name}' is not supported.", field="device", remedy="Use 'cpu' or 'cuda'.")
    return torch.device("cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that `LlmArgs.dtype` means on `device`: `auto` is bfloat16 where the device computes in it."""
    if name == "auto":
        return torch.bfloat16 if computes_bfloat16(device) else torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def resolve_cache_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type that `KvCacheConfig.dtype` means for a model of `dtype`.

    Raises:
        UnsupportedFeatureError: float8 on a device without it.
    """
    if name == "auto":
        return dtype
    if name == "fp8":
        if device.type != "cuda":
            raise UnsupportedFeatureError(
                f"A cache of float8 does not work on the device '{device.type}'.",
                field="dtype",
                remedy="Leave KvCacheConfig.dtype at 'auto'.",
            )
        return torch.float8_e4m3fn
    return resolve_dtype(name, device)


def resolve_max_num_tokens(args: LlmArgs, device: torch.device) -> int:
    """Most tokens of one step: what the user said, else what `LlmArgs.max_num_tokens` says of the device."""
    if args.max_num_tokens is not None:
        return args.max_num_tokens
    return 512 if device.type == "cpu" and args.enable_chunked_prefill else 2048


def resolve_max_seq_len(args: LlmArgs, config: ModelConfig) -> int:
    """The longest sequence: what the user said, else the model's context.

    Raises:
        InvalidParameterError: longer than the model's context.
    """
    if args.max_seq_len is None:
        return config.max_position_embeddings
    if args.max_seq_len > config.max_position_embeddings:
        raise InvalidParameterError(
            f"max_seq_len ({args.max_seq_len}) is more than the model's context ({config.max_position_embeddings}).",
            field="max_seq_len",
            remedy=f"Use {config.max_position_embeddings} or less.",
        )
    return args.max_seq_len


def resolve_max_input_len(args: LlmArgs) -> int | None:
    """The longest prompt, if the user limits it."""
    return None if args.build_config is None else args.build_config.max_input_len


def check_deterministic(
    args: LlmArgs, backend: Literal["engine", "torch"], device: torch.device, dtype: torch.dtype
) -> None:
    """Refuse `args.deterministic` where products are a library's, which chooses its ways by the number of rows.

    Raises:
        UnsupportedFeatureError: this backend has no kernels of its own for the device and type.
    """
    if not args.deterministic:
        return
    if device.type == "cpu" and backend == "torch":
        raise UnsupportedFeatureError(
            "The torch backend on a CPU does not compute a token in the same way in every batch.",
            field="deterministic",
            remedy="Use backend='engine', or a GPU.",
        )
    if device.type == "cuda" and dtype == torch.float32:
        raise UnsupportedFeatureError(
            "In float32 a GPU does not compute a token in the same way in every batch.",
            field="deterministic",
            remedy="Use dtype='bfloat16' or 'float16', and backend='torch'.",
        )


def has_fp8_weights(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint's weights are float8 with scales.

    Raises:
        UnsupportedFeatureError: they are quantized in a way that cannot be read.
    """
    return read_format(checkpoint.hf_config, {}) is not None


def load_cache_scales(model: CausalLM, checkpoint: Checkpoint) -> int:
    """Give each attention layer the scales of keys and values that the checkpoint has for a float8 cache.

    They are one number for a layer, beside the projection or the attention itself (`self_attn.k_proj.k_scale`,
    `self_attn.k_scale`, `self_attn.attn.k_scale`). A layer without them keeps 1.

    Returns:
        Layers that have scales.

    Raises:
        UnsupportedFeatureError: there is a scale for each head.
        CheckpointError: a scale is not a positive number.
    """
    found: dict[str, dict[str, float]] = {}
    for name, tensor in named_tensors(checkpoint, model.rename_weight, model.unstack_weight):
        match = _CACHE_SCALE.fullmatch(name)
        if match is not None:
            found.setdefault(match[1], {})[match[2]] = _cache_scale(name, tensor.load())
    num_layers = 0
    for name, module in model.named_modules():
        scales = found.get(name.rpartition(".")[0])
        if isinstance(module, Attention) and scales is not None:
            module.use_cache_scales(scales.get("k", 1.0), scales.get("v", 1.0))
            num_layers += 1
    return num_layers


def _cache_scale(name: str, scale: torch.Tensor) -> float:
    if scale.numel() != 1:
        raise UnsupportedFeatureError(
            f"'{name}' has {scale.numel()} scales of the cache; one for each layer is supported.",
            field="dtype",
            remedy="Leave KvCacheConfig.dtype at 'auto'.",
        )
    value = float(scale)
    if not 0.0 < value < float("inf"):
        raise CheckpointError(f"'{name}' is {value}, which is no scale.", field="model")
    return value


def load_model(
    args: LlmArgs,
    config: ModelConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    backend: AttentionBackend,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> CausalLM:
    """Build the model that `config` describes and fill it.

    Raises:
        CheckpointError: tensors are missing, left over or of the wrong shape.
        UnsupportedFeatureError: the architecture is not supported.
    """
    assert args.quantization in (None, "fp8"), "the backend was chosen by what it can do"
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors()}
    linear_method, experts_method = methods_for(
        args.quantization, read_format(checkpoint.hf_config, shapes), batch_invariant=args.deterministic
    )
    context = LayerContext(
        dtype=dtype,
        device=device,
        backend=backend,
        linear_method=linear_method,
        experts_method=experts_method,
        batch_invariant=args.deterministic,
    )
    model = load_model_class(config.model_type)(config, context)
    targets = weight_targets(model)
    if args.load_format == "dummy":
        fill_dummy(targets, seed=0)
    else:
        load_weights(
            targets,
            checkpoint,
            ignore=model.ignored_weights,
            rename=model.rename_weight,
            unstack=model.unstack_weight,
            on_progress=on_progress,
        )
    finalize_weights(model)
    return model.eval()
