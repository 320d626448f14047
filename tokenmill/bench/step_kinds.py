"""`step_tables`: from a profiled run to a table for its decode steps and one for its steps of prompts.

Steps of one kind differ in size; the most frequent size counts. Called by `profile`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from tokenmill.bench.kernels import Kernel, StepTable, kernels_of_steps, step_table
from tokenmill.bench.limits import measure_limits
from tokenmill.program.costs import StepSize
from tokenmill.telemetry.stats import StepStats

if TYPE_CHECKING:
    from tokenmill.llm import LLM

FIRST_PHASE: Final = "tokenmill: apply changes"
"""What the runner does once in each step, before anything else (`runtime.phases`)."""


def step_tables(llm: LLM, timeline: Mapping[str, Any], steps: Sequence[StepStats]) -> tuple[StepTable, ...]:
    """The tables of a run on a GPU; none if the profiler did not see every step.

    Args:
        llm: idle now: the device's limits are measured here.
        timeline: of torch's profiler, as JSON.
        steps: of the run, in order.
    """
    starts = sorted(
        float(event["ts"])
        for event in timeline["traceEvents"]
        if event.get("name") == FIRST_PHASE and event.get("cat") == "user_annotation"  # not the device's track
    )
    if len(starts) != len(steps) or not steps:
        return ()
    kernels = kernels_of_steps(timeline, starts)
    description = llm.description
    nbytes = linear_nbytes(llm)
    limits = measure_limits(torch.device(description.device), float8=nbytes == 1.0)
    tables = []
    for is_decode in (True, False):
        chosen = most_frequent_steps(steps, is_decode=is_decode)
        if chosen:
            size = _size(llm, [steps[index] for index in chosen])
            launches: list[Kernel] = [kernel for index in chosen for kernel in kernels[index]]
            tables.append(
                step_table(
                    _title(size, is_decode=is_decode), launches, len(chosen), description.model, size, limits,
                    linear_nbytes=nbytes,
                )
            )  # fmt: skip
    return tuple(tables)


def linear_nbytes(llm: LLM) -> float:
    """Bytes of a weight of a linear layer: 1 if they are quantized, by what the weights take."""
    description = llm.description
    model = description.model
    embeddings = (1 if model.tie_word_embeddings else 2) * model.vocab_size * model.hidden_size
    others = model.num_parameters() - embeddings
    return 1.0 if description.memory.weights - 2 * embeddings < 1.5 * others else 2.0


def most_frequent_steps(steps: Sequence[StepStats], *, is_decode: bool) -> list[int]:
    """Indices of the steps of one kind that have the most frequent size."""
    sizes = {
        index: step.num_decodes if is_decode else step.num_prompt_tokens
        for index, step in enumerate(steps)
        if (step.num_prefills == 0 if is_decode else step.num_decodes == 0)
    }
    if not sizes:
        return []
    wanted = Counter(sizes.values()).most_common(1)[0][0]
    return [index for index, size in sizes.items() if size == wanted]


def _size(llm: LLM, steps: Sequence[StepStats]) -> StepSize:
    """Of the steps on average. Contexts are known from the blocks in use, whose last one is half full on average."""
    num_rows = round(sum(max(step.num_decodes, step.num_prefills) for step in steps) / len(steps))
    num_prompt_tokens = round(sum(step.num_prompt_tokens for step in steps) / len(steps))
    contexts = []
    for step in steps:
        cache, num_running = step.kv_cache, max(step.num_running, 1)
        num_used = cache.num_blocks - cache.num_free_blocks
        contexts.append(num_used * cache.tokens_per_block / num_running - cache.tokens_per_block / 2)
    num_tokens = max(num_prompt_tokens, num_rows)
    return StepSize(
        num_tokens=num_tokens,
        num_rows=max(1, round(sum(step.num_generated_tokens for step in steps) / len(steps))),
        num_sequences=max(1, num_rows),
        context_len=max(-(-num_tokens // max(1, num_rows)), round(sum(contexts) / len(contexts))),
        cache_nbytes=getattr(torch, llm.description.cache_dtype).itemsize,
    )


def _title(size: StepSize, *, is_decode: bool) -> str:
    if is_decode:
        return f"Decode steps of {size.num_sequences} sequences, {size.context_len:,} tokens of context"
    return f"Steps of {size.num_tokens:,} prompt tokens of {size.num_sequences} sequences"
