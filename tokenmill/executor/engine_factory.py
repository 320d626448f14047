"""`build_engine`: from arguments to an engine that can step. Runs in the process that owns the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tokenmill.attention.select import check_backend, select_backend
from tokenmill.checkpoints.base import Checkpoint, open_checkpoint
from tokenmill.config import LlmArgs
from tokenmill.engine.core import EngineCore
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.executor.backend_choice import check_built_engine, choose_backend
from tokenmill.executor.description import EngineDescription
from tokenmill.executor.engine_source import EngineTarget, open_engine
from tokenmill.executor.program_factory import build_program_engine
from tokenmill.executor.runner_factory import make_model_runner, usable_memory
from tokenmill.executor.scheduling import make_core
from tokenmill.kv_cache.tensors import allocate_caches
from tokenmill.models.config import ModelConfig
from tokenmill.program.engine_config import is_engine
from tokenmill.program.package import EnginePackage
from tokenmill.runtime.memory_planner import MemoryRequest, plan_memory
from tokenmill.runtime.model_loader import (
    check_deterministic,
    has_fp8_weights,
    load_cache_scales,
    load_model,
    resolve_cache_dtype,
    resolve_device,
    resolve_dtype,
    resolve_max_input_len,
    resolve_max_num_tokens,
    resolve_max_seq_len,
)

logger = logging.getLogger(__name__)


def build_engine(
    args: LlmArgs,
    on_progress: Callable[[str, int, int], None] | None = None,
    *,
    num_sharing: int = 1,
    read: Callable[[], EnginePackage] | None = None,
) -> tuple[EngineCore, EngineDescription]:
    """Load the model, size and allocate its cache, and put scheduler and runner together.

    Args:
        args: `args.model` is a local path.
        on_progress: called while weights load.
        num_sharing: engines that are started now and share the device's free memory evenly.
        read: gives the engine in `args.model`, if it is one; None: it is read now.

    Raises:
        UserError: the model or a parameter cannot be used.
        OutOfMemoryError: the model or its cache does not fit.
    """
    _refuse_unsupported(args)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    if is_engine(Path(args.model)):
        package = EnginePackage.load(args.model) if read is None else read()
        built = package.config
        check_built_engine(args, device=built.target.device, dtype=built.dtype, quantization=built.quantization)
        return build_program_engine(args, package, on_progress, num_sharing=num_sharing)
    device = resolve_device(args.device)
    max_num_tokens = resolve_max_num_tokens(args, device)
    checkpoint = open_checkpoint(Path(args.model), config_only=args.load_format == "dummy")
    config = ModelConfig.from_hf(checkpoint.hf_config)
    choice = choose_backend(args, device, config, has_fp8_weights=has_fp8_weights(checkpoint))
    if choice.name == "engine":
        target = EngineTarget(
            device.type,
            args.max_batch_size,
            max_num_tokens,
            resolve_max_seq_len(args, config),
            resolve_max_input_len(args),
        )
        package = open_engine(args, target, on_progress)
        return build_program_engine(args, package, on_progress, num_sharing=num_sharing)
    if choice.reason is not None:
        logger.warning("The model runs on the torch backend: %s", choice.reason)
    return _build_torch_engine(args, device, checkpoint, config, on_progress, num_sharing)


def _build_torch_engine(
    args: LlmArgs,
    device: torch.device,
    checkpoint: Checkpoint,
    config: ModelConfig,
    on_progress: Callable[[str, int, int], None] | None,
    num_sharing: int,
) -> tuple[EngineCore, EngineDescription]:
    """The model runs as layers of torch."""
    max_num_tokens = resolve_max_num_tokens(args, device)
    dtype = resolve_dtype(args.dtype, device)
    cache_dtype = resolve_cache_dtype(args.kv_cache_config.dtype, dtype, device)
    max_seq_len = resolve_max_seq_len(args, config)
    check_deterministic(args, "torch", device, dtype)
    backend = select_backend(args.attn_backend, device, batch_invariant=args.deterministic)
    check_backend(backend.name, head_dim=config.head_dim, dtype=dtype, cache_dtype=cache_dtype)
    request = MemoryRequest(
        weight_bytes=dtype.itemsize,
        cache_bytes=cache_dtype.itemsize,
        max_batch_size=args.max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        is_cpu=device.type == "cpu",
        linear_bytes=1 if args.quantization == "fp8" or has_fp8_weights(checkpoint) else None,
    )
    memory = plan_memory(config, request, args.kv_cache_config, usable_memory(device, num_sharing))
    description = EngineDescription(
        model=config,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        cache_dtype=str(cache_dtype).removeprefix("torch."),
        attn_backend=backend.name,
        max_batch_size=args.max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        enable_chunked_prefill=args.enable_chunked_prefill,
        memory=memory,
        max_input_len=resolve_max_input_len(args),
    )
    model = load_model(args, config, checkpoint, device, dtype, backend, on_progress)
    if cache_dtype.itemsize == 1:
        load_cache_scales(model, checkpoint)
    make_caches = partial(
        allocate_caches,
        config.num_layers,
        tokens_per_block=memory.tokens_per_block,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=cache_dtype,
        device=device,
    )
    runner, description = make_model_runner(args, description, model, make_caches, num_sharing=num_sharing)
    overlap = device.type == "cuda"  # elsewhere host and device are one
    return make_core(args, description, runner, overlap=overlap), description


def _refuse_unsupported(args: LlmArgs) -> None:
    if args.tensor_parallel_size > 1:
        raise UnsupportedFeatureError(
            f"tensor_parallel_size={args.tensor_parallel_size}: this version runs on one device.",
            field="tensor_parallel_size",
            remedy="Set it to 1.",
        )
