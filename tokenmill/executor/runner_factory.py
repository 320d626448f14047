"""`make_model_runner`: the runner of steps by torch, whether a model of `models/` computes them or an engine's program.

On a GPU the cache has the size that is left once the largest steps have run, and steps are captured before the first
request. Called by `engine_factory` and `program_factory`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from tokenmill.attention.base import LayerCache
from tokenmill.attention.select import captures_graphs
from tokenmill.config import LlmArgs
from tokenmill.executor.description import EngineDescription
from tokenmill.ops.platform import free_memory, is_cuda
from tokenmill.runtime.device_errors import device_errors
from tokenmill.runtime.memory_planner import MeasuredMemory, MemoryRequest, plan_memory
from tokenmill.runtime.memory_probe import GRAPHS_ROOM, largest_decode_step, largest_step, peak_bytes, sampling_bytes
from tokenmill.runtime.model_runner import ModelRunner, StepModel
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_sizes import MAX_CAPTURED_TOKENS
from tokenmill.runtime.warm_up import run_together
from tokenmill.sampling.slot_params import SlotSamplingParams

MakeCaches: TypeAlias = Callable[[int], tuple[LayerCache, ...]]
"""Gives keys and values of every layer, for so many blocks."""

Step: TypeAlias = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _LargestSteps:
    """Steps that take the most memory.

    Args:
        step: of all.
        captured: of graphs, which share their memory; none if there are no graphs.
    """

    step: Step
    captured: Sequence[Step]


def usable_memory(device: torch.device, num_sharing: int) -> int:
    """Free bytes that each of `num_sharing` engines may take which start now.

    On a GPU what an engine before them left unused is given back first.
    """
    if is_cuda(device):
        gc.collect()
        torch.cuda.empty_cache()
    return free_memory(device) // num_sharing


def make_model_runner(
    args: LlmArgs, description: EngineDescription, model: StepModel, make_caches: MakeCaches, *, num_sharing: int = 1
) -> tuple[ModelRunner, EngineDescription]:
    """The runner, ready for its first plan, and what it runs: on a GPU with the memory plan that was made by measuring.

    Args:
        args: how to serve.
        description: what runs; its memory plan is a prediction.
        model: computes steps, on the description's device.
        make_caches: allocates the cache.
        num_sharing: engines that are started now and share the device's free memory evenly.

    Raises:
        OutOfMemoryError: the largest step does not fit, or leaves no room for the cache.
    """
    device, memory = torch.device(description.device), description.memory
    measures = is_cuda(device)
    slots = SlotState(description.max_batch_size, description.max_seq_len, memory.tokens_per_block, device)
    # One more for the scratch slot.
    sampling = SlotSamplingParams(description.max_batch_size + 1, description.model.vocab_size, device)
    caches = make_caches(1 if measures else memory.num_blocks)
    use_graphs = captures_graphs(description.attn_backend, wanted=args.enable_cuda_graphs)
    max_graph_tokens = min(description.max_num_tokens, MAX_CAPTURED_TOKENS)
    runner = ModelRunner(model, caches, slots, sampling, use_graphs=use_graphs, max_graph_tokens=max_graph_tokens)
    if not measures:
        return runner, description
    with device_errors():
        steps = _largest_steps(description, model, caches, slots, max_graph_tokens if use_graphs else None)
        num_logits = description.max_batch_size * description.model.vocab_size
        measured = _run_and_measure(runner, steps, num_logits, device)
        free = free_memory(device) // num_sharing + measured.weights
        memory = plan_memory(description.model, _request(description), args.kv_cache_config, free, measured)
        description = replace(description, memory=memory)
        runner.use_caches(make_caches(memory.num_blocks))
        runner.warm_up()
    return runner, description


def _largest_steps(
    description: EngineDescription,
    model: StepModel,
    caches: tuple[LayerCache, ...],
    slots: SlotState,
    max_graph_tokens: int | None,
) -> _LargestSteps:
    """`max_graph_tokens`: of the largest step with prompts that is captured; None: no step is."""
    max_num_tokens, max_batch_size = description.max_num_tokens, description.max_batch_size
    largest = largest_step(model, caches, slots, max_num_tokens, max_batch_size)
    if max_graph_tokens is None:
        return _LargestSteps(largest, ())
    of_prompts = largest
    if max_graph_tokens < max_num_tokens:
        of_prompts = largest_step(model, caches, slots, max_graph_tokens, max_batch_size)
    return _LargestSteps(largest, (of_prompts, largest_decode_step(model, caches, slots, max_batch_size)))


def _run_and_measure(
    runner: ModelRunner, steps: _LargestSteps, num_logits: int, device: torch.device
) -> MeasuredMemory:
    """What weights and the largest steps take on the GPU; the first runs, in which kernels are compiled, come before.

    `num_logits`: of the largest batch.
    """
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated(device)
    run_together([steps.step, *runner.first_runs()], device)
    peak = peak_bytes(steps.step, device)
    peaks = [peak if step is steps.step else peak_bytes(step, device) for step in steps.captured]
    return MeasuredMemory(weights, max(peak, sampling_bytes(num_logits)), GRAPHS_ROOM + max(peaks) if peaks else 0)


def _request(description: EngineDescription) -> MemoryRequest:
    return MemoryRequest(
        weight_bytes=getattr(torch, description.dtype).itemsize,
        cache_bytes=getattr(torch, description.cache_dtype).itemsize,
        max_batch_size=description.max_batch_size,
        max_num_tokens=description.max_num_tokens,
        max_seq_len=description.max_seq_len,
        is_cpu=False,
    )
