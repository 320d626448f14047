"""`inspect_model`: what a model is and what it will take, from its headers alone. No weight is loaded.

Called by `tokenmill inspect`, and by anyone who wants to know before paying for a machine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tokenmill.attention.select import BACKENDS, select_backend
from tokenmill.checkpoints.base import Checkpoint, open_checkpoint
from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.config import LlmArgs
from tokenmill.errors import OutOfMemoryError, UserError
from tokenmill.models.config import ModelConfig
from tokenmill.models.linear_kernels import KernelChoice, linear_kernels
from tokenmill.ops.platform import free_memory
from tokenmill.runtime.memory_planner import MemoryPlan, MemoryRequest, plan_memory
from tokenmill.runtime.model_loader import (
    has_fp8_weights,
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


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What `inspect_model` found.

    Args:
        model: as the caller named it.
        checkpoint: the files.
        config: the architecture's numbers.
        num_parameters: of the model, tied embeddings counted once.
        tokenizer: None when the model comes without one.
        device, dtype, cache_dtype: where and in which types it would run.
        attn_backend: the attention backend that would be used.
        attn_backends: all that there are.
        max_batch_size, max_num_tokens, max_seq_len: limits of the plan.
        memory: the plan, for this machine's free memory.
        linear_kernels: what multiplies each linear layer on a GPU, by numbers of rows.
        shortage: why the model does not fit this machine; None when it does. Then `memory` is what would be needed.
    """

    model: str
    checkpoint: CheckpointReport
    config: ModelConfig
    num_parameters: int
    tokenizer: TokenizerReport | None
    device: str
    dtype: str
    cache_dtype: str
    attn_backend: str
    attn_backends: tuple[str, ...]
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    memory: MemoryPlan
    linear_kernels: tuple[KernelChoice, ...]
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


def inspect_model(model: str | Path, **args: Any) -> ModelReport:
    """Report on `model`, fetching it if need be, without loading its weights.

    Args:
        model: as for `LLM`.
        args: as for `LLM`: `dtype`, `device`, `max_batch_size`, `max_seq_len`, ... shape the memory plan.

    Raises:
        UserError: the model or an argument cannot be used.
    """
    checked = LlmArgs(model=model, **args)
    path = resolve_model(model, revision=checked.revision)
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_hf(checkpoint.hf_config)
    device = resolve_device(checked.device)
    dtype = resolve_dtype(checked.dtype, device)
    cache_name = checked.kv_cache_config.dtype
    cache_dtype = dtype if cache_name == "auto" else resolve_dtype(cache_name, device)
    max_num_tokens = resolve_max_num_tokens(checked, device)
    max_seq_len = resolve_max_seq_len(checked, config)
    request = MemoryRequest(
        weight_bytes=dtype.itemsize,
        cache_bytes=cache_dtype.itemsize,
        max_batch_size=checked.max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        is_cpu=device.type == "cpu",
    )
    memory, shortage = _plan(config, request, checked, device)
    return ModelReport(
        model=str(model),
        checkpoint=_checkpoint_report(checkpoint),
        config=config,
        num_parameters=config.num_parameters(),
        tokenizer=_tokenizer_report(path, config),
        device=str(device),
        dtype=_name(dtype),
        cache_dtype=_name(cache_dtype),
        attn_backend=select_backend(checked.attn_backend, device).name,
        attn_backends=tuple(BACKENDS),
        max_batch_size=checked.max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        memory=memory,
        linear_kernels=linear_kernels(
            config,
            float8=checked.quantization == "fp8" or has_fp8_weights(checkpoint),
            deterministic=checked.deterministic,
        ),
        shortage=shortage,
    )


def _plan(
    config: ModelConfig, request: MemoryRequest, args: LlmArgs, device: torch.device
) -> tuple[MemoryPlan, str | None]:
    """The plan for this machine, or what would be needed and why it does not fit."""
    try:
        return plan_memory(config, request, args.kv_cache_config, free_memory(device)), None
    except OutOfMemoryError as error:
        return plan_memory(config, request, args.kv_cache_config, None), str(error)


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
