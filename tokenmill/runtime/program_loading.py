"""From an engine to what runs its steps: weights brought to the device, cache and step arrays allocated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenmill.attention.base import LayerCache
from tokenmill.attention.select import select_backend
from tokenmill.kv_cache.tensors import allocate_caches
from tokenmill.ops.platform import num_usable_cores
from tokenmill.program.engine_config import MIN_LOGIT_ROWS
from tokenmill.program.package import EnginePackage
from tokenmill.program.program import Program
from tokenmill.runtime.program_executor import ProgramExecutor, ProgressCallback, TorchExecutor
from tokenmill.runtime.program_parts import layer_caches
from tokenmill.runtime.step_arrays import StepArrays
from tokenmill.runtime.torch_program import TorchProgram
from tokenmill.runtime.weight_decoding import decode_weight

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """The largest step, and the cache.

    Args:
        max_batch_size: sequences of a step.
        max_num_tokens: tokens of a step.
        max_seq_len: longest sequence, in tokens.
        num_blocks: cache blocks, the reserved block 0 included.
        tokens_per_block: tokens in one block.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    num_blocks: int
    tokens_per_block: int

    def arrays(self) -> StepArrays:
        """Arrays for steps of these sizes."""
        return StepArrays(
            max_num_tokens=self.max_num_tokens,
            max_batch_size=self.max_batch_size,
            max_num_rows=max(self.max_batch_size, MIN_LOGIT_ROWS),
            max_seq_len=self.max_seq_len,
            tokens_per_block=self.tokens_per_block,
        )


def load_torch_program(
    package: EnginePackage,
    device: torch.device,
    *,
    attn_backend: str = "auto",
    keep: Sequence[str] = (),
    deterministic: bool = False,
) -> TorchProgram:
    """The engine's program for torch, its weights decoded on `device`.

    `deterministic` is `LlmArgs.deterministic`, which `check_deterministic` has allowed.

    Raises:
        EngineFileError: the engine's weights were stripped.
        UnsupportedFeatureError: they are packed for kernels of a CPU.
    """
    package.check_runnable()
    weights = {
        weight.name: decode_weight(weight, package.weights[weight.name]).to(device)
        for weight in package.program.weights
    }
    backend = select_backend(attn_backend, device, batch_invariant=deterministic)
    return TorchProgram(package.program, weights, backend, keep=keep, batch_invariant=deterministic)


def cpu_step_nbytes(program: Program, max_num_tokens: int, max_num_rows: int) -> int:
    """Bytes that an executor on a CPU takes for the results of the largest step and for the screen of the head."""
    from tokenmill.runtime.cpu_memory import step_nbytes
    from tokenmill.runtime.head_screen import screen_nbytes

    return step_nbytes(program, max_num_tokens, max_num_rows) + screen_nbytes(program)


def allocate_program_caches(
    program: Program, num_blocks: int, tokens_per_block: int, dtype: torch.dtype, device: torch.device
) -> tuple[LayerCache, ...]:
    """Keys and values of every layer, not initialized."""
    return tuple(
        allocate_caches(1, num_blocks, tokens_per_block, shape.num_kv_heads, shape.head_dim, dtype, device)[0]
        for shape in layer_caches(program)
    )


def load_executor(
    package: EnginePackage,
    limits: StepLimits,
    cache_dtype: torch.dtype,
    *,
    num_threads: int | None = None,
    on_progress: ProgressCallback | None = None,
    deterministic: bool = False,
) -> ProgramExecutor:
    """What runs the engine's steps on a CPU.

    Args:
        package: the engine.
        limits: sizes of steps and cache.
        cache_dtype: type of cached keys and values.
        num_threads: None: one for each core.
        on_progress: told about kernels that are compiled.
        deterministic: compute a token in the same way in every batch.

    Raises:
        EngineFileError: the engine's weights were stripped.
        UnsupportedFeatureError: it needs kernels that this machine has not.
    """
    from tokenmill.ops.cpu.cpu_features import best_dot_product
    from tokenmill.runtime.cpu_program import CpuExecutor

    package.check_runnable()
    num_threads = num_threads or num_usable_cores()
    logger.info("Steps run on %d threads with kernels for %s.", num_threads, best_dot_product().name.lower())
    return CpuExecutor(
        package,
        limits.arrays(),
        limits.num_blocks,
        cache_dtype,
        num_threads,
        on_progress,
        deterministic=deterministic,
    )


def load_torch_executor(
    package: EnginePackage,
    limits: StepLimits,
    cache_dtype: torch.dtype,
    device: torch.device,
    *,
    attn_backend: str = "auto",
) -> ProgramExecutor:
    """An executor that computes with torch. Raises as `load_torch_program`."""
    keep = tuple(package.config.debug_outputs.values())
    program = load_torch_program(package, device, attn_backend=attn_backend, keep=keep)
    caches = allocate_program_caches(package.program, limits.num_blocks, limits.tokens_per_block, cache_dtype, device)
    return TorchExecutor(program, caches, limits.arrays(), device)
