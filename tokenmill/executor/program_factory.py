"""`build_program_engine`: from a built engine to an engine core that can step. Called by `engine_factory`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from tokenmill.attention.select import check_backend, select_backend
from tokenmill.config import LlmArgs
from tokenmill.engine.core import EngineCore
from tokenmill.errors import InvalidParameterError
from tokenmill.executor.description import EngineDescription
from tokenmill.executor.runner_factory import make_model_runner, usable_memory
from tokenmill.executor.scheduling import make_core
from tokenmill.models.config import ModelConfig
from tokenmill.program.engine_config import MIN_LOGIT_ROWS
from tokenmill.program.package import EnginePackage
from tokenmill.runtime.memory_planner import MeasuredMemory, MemoryRequest, plan_memory
from tokenmill.runtime.model_loader import (
    check_deterministic,
    resolve_cache_dtype,
    resolve_device,
    resolve_max_input_len,
    resolve_max_num_tokens,
)
from tokenmill.runtime.program_executor import ProgressCallback
from tokenmill.runtime.program_loading import (
    StepLimits,
    allocate_program_caches,
    cpu_step_nbytes,
    load_executor,
    load_torch_program,
)
from tokenmill.runtime.program_runner import ProgramRunner
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.weight_decoding import decoded_nbytes
from tokenmill.sampling.slot_params import SlotSamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int


def build_program_engine(
    args: LlmArgs, package: EnginePackage, on_progress: ProgressCallback | None = None, *, num_sharing: int = 1
) -> tuple[EngineCore, EngineDescription]:
    """Size and allocate the cache of a built engine, and put scheduler and runner together.

    Args:
        args: how to serve; sizes that were not set take the engine's.
        package: the engine.
        on_progress: called while kernels are compiled.
        num_sharing: engines that are started now and share the device's free memory evenly.

    Raises:
        UserError: a parameter does not fit the engine.
        OutOfMemoryError: the cache does not fit.
    """
    device = engine_device(args, package)
    free = usable_memory(device, num_sharing)
    description = describe_program_engine(args, package, device, package.weight_nbytes, free)
    if device.type == "cpu":
        on_cpu = _cpu_runner(args, package, description, on_progress)
        return make_core(args, description, on_cpu, overlap=False), description
    model = load_torch_program(package, device, attn_backend=args.attn_backend, deterministic=args.deterministic)
    make_caches = partial(
        allocate_program_caches,
        package.program,
        tokens_per_block=description.tokens_per_block,
        dtype=getattr(torch, description.cache_dtype),
        device=device,
    )
    runner, description = make_model_runner(args, description, model, make_caches, num_sharing=num_sharing)
    return make_core(args, description, runner, overlap=device.type == "cuda"), description


def engine_device(args: LlmArgs, package: EnginePackage) -> torch.device:
    """The device that an engine runs on.

    Raises:
        InvalidParameterError: it is not here, or the caller wants another kind of device.
    """
    device = resolve_device(package.config.target.device if args.device == "auto" else args.device)
    if device.type != package.config.target.device:
        raise InvalidParameterError(
            f"The engine was built for '{package.config.target.device}', not for '{device.type}'.",
            field="device",
            remedy="Leave the device out, or build the engine for it.",
        )
    return device


def describe_program_engine(
    args: LlmArgs, package: EnginePackage, device: torch.device, weight_nbytes: int, free: int | None
) -> EngineDescription:
    """What `build_program_engine` will run, its memory plan included, without allocating anything.

    Args:
        args: how to serve.
        package: the engine; its weights are not looked at.
        device: of the engine.
        weight_nbytes: of all weights in the engine; on a GPU they are decoded.
        free: bytes of memory; None plans the cache that all sequences of the longest length need.

    Raises:
        UserError: a parameter does not fit the engine.
        OutOfMemoryError: the cache does not fit.
    """
    config = ModelConfig.from_hf(package.config.model.hf_config)
    sizes = _sizes(args, package, device)
    dtype = getattr(torch, package.config.dtype)
    cache_name = args.kv_cache_config.dtype
    engine_cache_dtype = getattr(torch, package.config.kv_cache_dtype)
    cache_dtype = engine_cache_dtype if cache_name == "auto" else resolve_cache_dtype(cache_name, dtype, device)
    request = MemoryRequest(
        weight_bytes=dtype.itemsize,
        cache_bytes=cache_dtype.itemsize,
        max_batch_size=sizes.max_batch_size,
        max_num_tokens=sizes.max_num_tokens,
        max_seq_len=sizes.max_seq_len,
        is_cpu=device.type == "cpu",
    )
    graphs = 0
    if device.type == "cpu":
        step = cpu_step_nbytes(package.program, sizes.max_num_tokens, max(sizes.max_batch_size, MIN_LOGIT_ROWS))
    else:
        step, weight_nbytes = package.program.arena_bytes, decoded_nbytes(package.program)
        graphs = step if args.enable_cuda_graphs else 0  # they hold the tensors of one step in memory of their own
    memory = plan_memory(config, request, args.kv_cache_config, free, MeasuredMemory(weight_nbytes, step, graphs))
    is_16_bit = all(buffer.dtype != "float32" for buffer in package.program.buffers)  # what products read
    check_deterministic(args, "engine", device, dtype if is_16_bit else torch.float32)
    attn_backend = select_backend(args.attn_backend, device).name
    check_backend(attn_backend, head_dim=config.head_dim, dtype=dtype, cache_dtype=cache_dtype)
    return EngineDescription(
        model=config,
        device=str(device),
        dtype=package.config.dtype,
        cache_dtype=str(cache_dtype).removeprefix("torch."),
        attn_backend=attn_backend,
        max_batch_size=sizes.max_batch_size,
        max_num_tokens=sizes.max_num_tokens,
        max_seq_len=sizes.max_seq_len,
        enable_chunked_prefill=args.enable_chunked_prefill,
        memory=memory,
        backend="engine",
        max_input_len=min(package.config.limits.max_input_len, resolve_max_input_len(args) or sizes.max_seq_len),
    )


def _sizes(args: LlmArgs, package: EnginePackage, device: torch.device) -> _Sizes:
    limits = package.config.limits
    found = {}
    for name in ("max_batch_size", "max_num_tokens", "max_seq_len"):
        wanted, limit = getattr(args, name), getattr(limits, name)
        if wanted is not None and wanted > limit and name in args.model_fields_set:
            raise InvalidParameterError(
                f"{name} is {wanted}, but the engine was built for {limit} at most.",
                field=name,
                remedy=f"Use {limit} or less, or build the engine with a larger {name}.",
            )
        if name == "max_num_tokens":
            wanted = resolve_max_num_tokens(args, device)
        found[name] = limit if wanted is None else min(wanted, limit)
    return _Sizes(**found)


def _cpu_runner(
    args: LlmArgs, package: EnginePackage, description: EngineDescription, on_progress: ProgressCallback | None
) -> ProgramRunner:
    memory, device = description.memory, torch.device("cpu")
    slots = SlotState(description.max_batch_size, description.max_seq_len, memory.tokens_per_block, device)
    # One more for the scratch slot.
    sampling = SlotSamplingParams(description.max_batch_size + 1, description.model.vocab_size, device)
    # What is left to torch (sampling, log-probabilities) is small; its threads would only get in the kernels' way.
    torch.set_num_threads(1)
    limits = StepLimits(
        max_batch_size=description.max_batch_size,
        max_num_tokens=description.max_num_tokens,
        max_seq_len=description.max_seq_len,
        num_blocks=memory.num_blocks,
        tokens_per_block=memory.tokens_per_block,
    )
    executor = load_executor(
        package,
        limits,
        getattr(torch, description.cache_dtype),
        num_threads=args.num_threads,
        on_progress=on_progress,
        deterministic=args.deterministic,
    )
    return ProgramRunner(executor, slots, sampling)
