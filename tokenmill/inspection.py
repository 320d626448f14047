"""`inspect_model`: what a model is and what it will take, from its headers alone. No weight is loaded.

`plan_engine` is the same for the memory of a built engine. Called by `tokenmill inspect`, and by anyone who wants
to know before paying for a machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tokenmill.attention.select import BACKENDS, select_backend
from tokenmill.builder.build import build
from tokenmill.builder.packing import packed_nbytes
from tokenmill.checkpoints.base import Checkpoint, open_checkpoint
from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.config import LlmArgs
from tokenmill.errors import OutOfMemoryError, UserError
from tokenmill.executor.backend_choice import check_built_engine, choose_backend
from tokenmill.executor.description import EngineDescription
from tokenmill.executor.engine_source import EngineTarget, build_config
from tokenmill.executor.program_factory import describe_program_engine, engine_device
from tokenmill.models.config import ModelConfig
from tokenmill.models.linear_kernels import KernelChoice, linear_kernels
from tokenmill.ops.cublas_lt import gpu_machine, is_available
from tokenmill.ops.platform import free_memory
from tokenmill.ops.product_choices import GpuMachine, ProductChoices
from tokenmill.program.package import EnginePackage
from tokenmill.runtime.memory_planner import MemoryPlan, MemoryRequest, plan_memory
from tokenmill.runtime.model_loader import (
    has_fp8_weights,
    resolve_cache_dtype,
    resolve_device,
    resolve_dtype,
    resolve_max_num_tokens,
    resolve_max_seq_len,
)
from tokenmill.tokenization import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """The files.

    Args:
        path: where they are.
        format: `safetensors` or `gguf`.
        quantization: of the weights as they are stored; `none` if they are not.
        num_bytes: of all tensors on disk.
        num_tensors: stored tensors.
        num_stored_parameters: numbers in them.
    """

    path: str
    format: str
    quantization: str
    num_bytes: int
    num_tensors: int
    num_stored_parameters: int


@dataclass(frozen=True, slots=True)
class TokenizerReport:
    """How text becomes tokens.

    Args:
        vocab_size: tokens that the tokenizer knows.
        has_chat_template: whether the model says how a conversation is written.
        end_tokens: (token id, its text) of every token that ends an answer.
    """

    vocab_size: int
    has_chat_template: bool
    end_tokens: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """What a model takes when it runs here.

    Args:
        num_parameters: of the model, tied embeddings counted once.
        backend: what would run it: `engine` or `torch`.
        device, dtype, cache_dtype: where and in which types it would run; with the engine backend `dtype` is that of
            weights that are not quantized.
        weight_formats: of the linear weights as they would lie in memory: a type, or quantized formats joined by `+`.
        max_batch_size, max_num_tokens, max_seq_len: limits of the plan.
        memory: the plan, for this machine's free memory.
        shortage: why the model does not fit this machine; None when it does. Then `memory` is what would be needed.
    """

    num_parameters: int
    backend: str
    device: str
    dtype: str
    cache_dtype: str
    weight_formats: str
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    memory: MemoryPlan
    shortage: str | None

    @property
    def kv_bytes_per_sequence(self) -> int:
        """Bytes that the cache of one sequence of `max_seq_len` tokens takes."""
        block = self.memory.tokens_per_block
        return -(-self.max_seq_len // block) * block * self.memory.kv_bytes_per_token

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = asdict(self)
        plain["memory"] |= {
            "total": self.memory.total,
            "cache_tokens": self.memory.cache_tokens,
            "kv_bytes_per_sequence": self.kv_bytes_per_sequence,
        }
        return plain


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport(MemoryReport):
    """What `inspect_model` found.

    Args:
        model: as the caller named it.
        checkpoint: the files.
        config: the architecture's numbers.
        tokenizer: None when the model comes without one.
        backend_reason: why it is not the engine, where the engine would be the first choice.
        attn_backend: the attention backend that would be used.
        attn_backends: all that there are.
        linear_kernels: what multiplies each linear layer on a GPU, by numbers of rows.
        measured_on: the GPU and versions whose measured algorithms are among them: those of this machine's GPU, else
            those that were measured last; None: there are none yet.
    """

    model: str
    checkpoint: CheckpointReport
    config: ModelConfig
    tokenizer: TokenizerReport | None
    backend_reason: str | None
    attn_backend: str
    attn_backends: tuple[str, ...]
    linear_kernels: tuple[KernelChoice, ...]
    measured_on: GpuMachine | None


def inspect_model(model: str | Path, **args: Any) -> ModelReport:
    """Report on `model`, fetching it if need be, without loading its weights.

    Args:
        model: as for `LLM`.
        args: as for `LLM`: `dtype`, `device`, `max_batch_size`, `max_seq_len`, ... shape the memory plan. With
            `load_format="dummy"` a directory needs its config.json alone. `device="cuda"` plans for a GPU on a machine
            without one, too: what weights, steps and a cache for all sequences would take.

    Raises:
        UserError: the model or an argument cannot be used.
    """
    checked = LlmArgs(model=model, **args)
    path = resolve_model(model, revision=checked.revision)
    checkpoint = open_checkpoint(path, config_only=checked.load_format == "dummy")
    config = ModelConfig.from_hf(checkpoint.hf_config)
    if _is_elsewhere(checked.device):
        device = torch.device("cuda")
        if checked.dtype == "auto":
            checked = checked.model_copy(update={"dtype": "bfloat16"})
    else:
        device = resolve_device(checked.device)
    choice = choose_backend(checked, device, config, has_fp8_weights=has_fp8_weights(checkpoint))
    plan = _engine_plan if choice.name == "engine" else _torch_plan
    planned = plan(checked.model_copy(update={"model": path}), checkpoint, config, device)
    measured = _measured_products(device)
    return ModelReport(
        model=str(model),
        checkpoint=_checkpoint_report(checkpoint),
        config=config,
        num_parameters=config.num_parameters(),
        tokenizer=_tokenizer_report(path, config),
        backend=choice.name,
        backend_reason=choice.reason,
        device=str(device),
        dtype=planned.dtype,
        cache_dtype=planned.cache_dtype,
        weight_formats=planned.weight_formats,
        attn_backend=select_backend(checked.attn_backend, device).name,
        attn_backends=tuple(BACKENDS),
        max_batch_size=checked.max_batch_size,
        max_num_tokens=resolve_max_num_tokens(checked, device),
        max_seq_len=resolve_max_seq_len(checked, config),
        memory=planned.memory,
        linear_kernels=linear_kernels(
            config,
            float8=checked.quantization == "fp8" or has_fp8_weights(checkpoint),
            deterministic=checked.deterministic,
            dtype="float16" if checked.dtype == "float16" else "bfloat16",
            measured=measured.choices if measured else (),
        ),
        measured_on=measured.machine if measured else None,
        shortage=planned.shortage,
    )


def plan_engine(package: EnginePackage, model: str | Path, **args: Any) -> MemoryReport:
    """What a built engine will take when it is started. Its weights are not looked at, and may be left out.

    Args:
        package: the engine.
        model: its directory, as the caller named it.
        args: as for `LLM`; sizes that are not given are the engine's, or the usual ones if those are smaller.

    Returns:
        The report. Of an engine for a GPU on a machine without one: the plan of a cache for all sequences.

    Raises:
        UserError: the engine cannot be started with these arguments.
    """
    checked, built = LlmArgs(model=model, **args), package.config
    check_built_engine(checked, device=built.target.device, dtype=built.dtype, quantization=built.quantization)
    wanted = built.target.device if checked.device == "auto" else checked.device
    is_elsewhere = built.target.device == "cuda" and _is_elsewhere(wanted)
    device = torch.device("cuda") if is_elsewhere else engine_device(checked, package)
    weight_nbytes = sum(packed_nbytes(weight) for weight in package.program.weights)

    def plan(free: int | None) -> EngineDescription:
        return describe_program_engine(checked, package, device, weight_nbytes, free)

    description, shortage = _or_shortage(plan, device)
    return MemoryReport(
        num_parameters=description.model.num_parameters(),
        backend="engine",
        device=description.device,
        dtype=description.dtype,
        cache_dtype=description.cache_dtype,
        weight_formats=description.dtype if built.quantization == "none" else built.quantization,
        max_batch_size=description.max_batch_size,
        max_num_tokens=description.max_num_tokens,
        max_seq_len=description.max_seq_len,
        memory=description.memory,
        shortage=shortage,
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a backend would need; the fields are those of `ModelReport`."""

    dtype: str
    cache_dtype: str
    weight_formats: str
    memory: MemoryPlan
    shortage: str | None


def _engine_plan(args: LlmArgs, checkpoint: Checkpoint, config: ModelConfig, device: torch.device) -> _Plan:
    """Of the engine that a start would build: its program is made, its weights are only counted."""
    max_num_tokens = resolve_max_num_tokens(args, device)
    target = EngineTarget(device.type, args.max_batch_size, max_num_tokens, resolve_max_seq_len(args, config))
    package = build(checkpoint.path, build_config(args, target).model_copy(update={"strip_weights": True}))
    weight_nbytes = sum(packed_nbytes(weight) for weight in package.program.weights)
    description, shortage = _or_shortage(
        lambda free: describe_program_engine(args, package, device, weight_nbytes, free), device
    )
    quantization = package.config.quantization
    return _Plan(
        dtype=description.dtype,
        cache_dtype=description.cache_dtype,
        weight_formats=description.dtype if quantization == "none" else quantization,
        memory=description.memory,
        shortage=shortage,
    )


def _torch_plan(args: LlmArgs, checkpoint: Checkpoint, config: ModelConfig, device: torch.device) -> _Plan:
    """Of the model as layers of torch."""
    dtype = resolve_dtype(args.dtype, device)
    cache_dtype = resolve_cache_dtype(args.kv_cache_config.dtype, dtype, device)
    is_fp8 = args.quantization == "fp8" or has_fp8_weights(checkpoint)
    request = MemoryRequest(
        weight_bytes=dtype.itemsize,
        cache_bytes=cache_dtype.itemsize,
        max_batch_size=args.max_batch_size,
        max_num_tokens=resolve_max_num_tokens(args, device),
        max_seq_len=resolve_max_seq_len(args, config),
        is_cpu=device.type == "cpu",
        linear_bytes=1 if is_fp8 else None,
    )
    memory, shortage = _or_shortage(lambda free: plan_memory(config, request, args.kv_cache_config, free), device)
    return _Plan(_name(dtype), _name(cache_dtype), "fp8" if is_fp8 else _name(dtype), memory, shortage)


_Planned = TypeVar("_Planned")


def _is_elsewhere(device: str) -> bool:
    """Whether it names a GPU, and this machine has none."""
    return re.fullmatch(r"cuda(:\d+)?", device) is not None and not torch.cuda.is_available()


def _or_shortage(plan: Callable[[int | None], _Planned], device: torch.device) -> tuple[_Planned, str | None]:
    """The plan for this machine, or what would be needed and why it does not fit; of a GPU elsewhere what is needed."""
    if _is_elsewhere(device.type):
        return plan(None), None
    try:
        return plan(free_memory(device)), None
    except OutOfMemoryError as error:
        return plan(None), str(error)


def _measured_products(device: torch.device) -> ProductChoices | None:
    """Of this machine's GPU; where there is none, what was measured last, perhaps on another machine."""
    if not is_available():
        return ProductChoices.newest()
    found = ProductChoices.load(gpu_machine(device if device.type == "cuda" else torch.device("cuda", 0)))
    return found if found.choices else None


def _checkpoint_report(checkpoint: Checkpoint) -> CheckpointReport:
    shapes = [tensor.shape for tensor in checkpoint.tensors()]
    return CheckpointReport(
        path=str(checkpoint.path),
        format=checkpoint.format,
        quantization=checkpoint.quantization,
        num_bytes=checkpoint.num_bytes,
        num_tensors=len(shapes),
        num_stored_parameters=sum(_product(shape) for shape in shapes),
    )


def _tokenizer_report(path: Path, config: ModelConfig) -> TokenizerReport | None:
    try:
        tokenizer = load_tokenizer(path)
    except UserError:
        return None  # weights alone are a model too: token ids in, token ids out
    end_ids = dict.fromkeys((*config.eos_token_ids, *tokenizer.eos_token_ids))
    return TokenizerReport(
        vocab_size=tokenizer.vocab_size,
        has_chat_template=tokenizer.has_chat_template,
        end_tokens=tuple((token_id, _token_text(tokenizer, token_id)) for token_id in end_ids),
    )


def _token_text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.decode([token_id], skip_special_tokens=False)


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
