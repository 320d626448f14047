"""`build_engine`: from arguments to an engine that can step. Runs in the process that owns the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tokenmill.attention.select import select_backend
from tokenmill.checkpoints.base import open_checkpoint
from tokenmill.config import LlmArgs
from tokenmill.engine.core import EngineCore
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.settings import SchedulerSettings
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.executor.description import EngineDescription
from tokenmill.kv_cache.manager import KvCacheManager
from tokenmill.kv_cache.tensors import allocate_caches
from tokenmill.models.base import CausalLM
from tokenmill.models.config import ModelConfig
from tokenmill.ops.platform import free_memory
from tokenmill.runtime.memory_planner import MemoryRequest, plan_memory
from tokenmill.runtime.model_loader import load_model, resolve_device, resolve_dtype, resolve_max_seq_len
from tokenmill.runtime.model_runner import ModelRunner
from tokenmill.runtime.slot_state import SlotState
from tokenmill.sampling.slot_params import SlotSamplingParams


def build_engine(
    args: LlmArgs, on_progress: Callable[[str, int, int], None] | None = None, *, num_sharing: int = 1
) -> tuple[EngineCore, EngineDescription]:
    """Load the model, size and allocate its cache, and put scheduler and runner together.

    Args:
        args: `args.model` is a local path.
        on_progress: called while weights load.
        num_sharing: engines that are started now and share the device's free memory evenly.

    Raises:
        UserError: the model or a parameter cannot be used.
        OutOfMemoryError: the model or its cache does not fit.
    """
    _refuse_unsupported(args)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    cache_dtype = dtype if args.kv_cache_config.dtype == "auto" else resolve_dtype(args.kv_cache_config.dtype, device)
    checkpoint = open_checkpoint(Path(args.model), config_only=args.load_format == "dummy")
    config = ModelConfig.from_hf(checkpoint.hf_config)
    max_seq_len = resolve_max_seq_len(args, config)
    backend = select_backend(args.attn_backend, device)
    request = MemoryRequest(
        weight_bytes=dtype.itemsize,
        cache_bytes=cache_dtype.itemsize,
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
        max_seq_len=max_seq_len,
        is_cpu=device.type == "cpu",
    )
    memory = plan_memory(config, request, args.kv_cache_config, free_memory(device) // num_sharing)
    description = EngineDescription(
        model=config,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        cache_dtype=str(cache_dtype).removeprefix("torch."),
        attn_backend=backend.name,
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
        max_seq_len=max_seq_len,
        enable_chunked_prefill=args.enable_chunked_prefill,
        memory=memory,
    )
    model = load_model(args, config, checkpoint, device, dtype, backend, on_progress)
    runner = _make_runner(description, model, device, cache_dtype)
    return EngineCore(_make_scheduler(args, description), runner), description


def _make_runner(
    description: EngineDescription, model: CausalLM, device: torch.device, cache_dtype: torch.dtype
) -> ModelRunner:
    config, memory = description.model, description.memory
    caches = allocate_caches(
        config.num_layers,
        memory.num_blocks,
        memory.tokens_per_block,
        config.num_key_value_heads,
        config.head_dim,
        cache_dtype,
        device,
    )
    slots = SlotState(description.max_batch_size, description.max_seq_len, memory.tokens_per_block, device)
    return ModelRunner(model, caches, slots, SlotSamplingParams(description.max_batch_size, config.vocab_size, device))


def _make_scheduler(args: LlmArgs, description: EngineDescription) -> Scheduler:
    kv_cache = KvCacheManager(
        description.memory.num_blocks,
        description.memory.tokens_per_block,
        enable_block_reuse=args.kv_cache_config.enable_block_reuse,
        enable_partial_reuse=args.kv_cache_config.enable_partial_reuse,
    )
    settings = SchedulerSettings(
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
        max_seq_len=description.max_seq_len,
        enable_chunked_prefill=args.enable_chunked_prefill,
        capacity_policy=args.scheduler_config.capacity_scheduler_policy,
        queue_policy=args.scheduler_config.waiting_queue_policy,
    )
    return Scheduler(settings, kv_cache)


def _refuse_unsupported(args: LlmArgs) -> None:
    if args.tensor_parallel_size > 1:
        raise UnsupportedFeatureError(
            f"tensor_parallel_size={args.tensor_parallel_size}: this version runs on one device.",
            field="tensor_parallel_size",
            remedy="Set it to 1.",
        )
