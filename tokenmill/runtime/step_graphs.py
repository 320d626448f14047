"""`StepGraphs`: steps captured as CUDA graphs by their size and replayed, so that small steps cost the host one launch.

Two kinds of steps are captured: one token for each row (decode), and a few short prompts. A step is padded up to the
next size: decode rows with the scratch slot, tokens of prompts with tokens of a scratch row; the longest context is
rounded up to a power of two. What differs from step to step lies in one small input tensor and in the slots, both read
on the device. A size runs eagerly the first time (kernels compile, libraries start) and is captured the second time;
greedy decode steps are captured when the engine starts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tokenmill.engine.plan import Row
from tokenmill.ops.upload import upload
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_inputs import StepInputs, inputs_of_decode, inputs_of_prompts
from tokenmill.sampling.sampled_tokens import SampledTokens

SMALLEST_KV_BOUND = 1024
"""Contexts up to this many tokens share graphs."""

MANY_ROWS = 64
"""From so many decode rows on there is one graph for all contexts: they fill the device without being split."""

COMPILED_ROWS = (1, 2, 4, 16, 32, 64, 128, 256)
"""Numbers of decode rows from which on other kernels are used, or other blocks, or arguments of other divisors."""

PROMPT_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512)
"""Tokens of captured steps with prompts; longer steps keep the device busy without graphs."""

PROMPT_ROWS = (1, 2, 4, 8, 16)
"""Rows of captured steps with prompts."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves; of a captured one, overwritten by the next replay of the same graph.

    Args:
        inputs: of all rows, padding included.
        hidden: [R, hidden_size] of each row's last token, for a sampler; None if the tokens were chosen in the step.
        sampled: the chosen tokens, written to their slots already; None if a sampler has to choose.
    """

    inputs: StepInputs
    hidden: torch.Tensor | None
    sampled: SampledTokens | None


Step = Callable[[StepInputs, bool], StepResult]
"""Runs the model on inputs; with True it also takes the most likely tokens."""


class StepSize(NamedTuple):
    """What a graph is captured for.

    Args:
        num_rows: rows, padding included.
        num_tokens: tokens of prompts, padding included; 0: each row computes one token.
        max_kv_len: longest context.
        greedy: whether the tokens are chosen in the graph.
    """

    num_rows: int
    num_tokens: int
    max_kv_len: int
    greedy: bool


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    rows: torch.Tensor  # [columns, R] int64: see `_host_rows`
    result: StepResult


class StepGraphs:
    """Captured steps by size.

    Args:
        step: what is captured.
        state: the slots.
        max_batch_size: most rows of a step.
    """

    def __init__(self, step: Step, state: SlotState, max_batch_size: int) -> None:
        self._step = step
        self._state = state
        self._max_batch_size = max_batch_size
        self._captured: dict[StepSize, _Captured | None] = {}  # None: has run once
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(state.device)  # type: ignore[no-untyped-call]

    def size_of(self, rows: Sequence[Row], *, greedy: bool) -> StepSize | None:
        """The size under which a step with these rows runs; None if it is not one to capture."""
        return step_size(rows, self._max_batch_size, self._state.max_seq_len, greedy=greedy)

    def first_runs(self) -> list[Callable[[], object]]:
        """Decode steps between which kernels differ, to be run once. Their rows are padding: nothing is changed."""
        sizes = self._decode_sizes()
        return [partial(self.run, (), size) for size in sizes if size.num_rows in COMPILED_ROWS or size == sizes[0]]

    def capture_decode_steps(self) -> None:
        """Capture greedy decode steps of all numbers of rows, of short contexts where that makes a difference.

        Largest first, so that the others find room in its memory.
        """
        for size in self._decode_sizes():
            while self._captured.get(size) is None:
                self.run((), size)

    def _decode_sizes(self) -> list[StepSize]:
        """Largest first."""
        buckets = {batch_bucket(num_rows, self._max_batch_size) for num_rows in range(1, self._max_batch_size + 1)}
        max_seq_len = self._state.max_seq_len
        return [
            StepSize(num_rows, 0, kv_bucket(1, max_seq_len, num_rows), greedy=True)
            for num_rows in sorted(buckets, reverse=True)
        ]

    def run(self, rows: Sequence[Row], size: StepSize) -> StepResult:
        """Run the step of these rows."""
        host = _host_rows(rows, size, self._state.scratch_slot)
        if size not in self._captured:
            self._captured[size] = None
            return self._run_step(upload(host, self._state.device), size)
        captured = self._captured[size] or self._capture(size, host.shape[0])
        captured.rows.copy_(torch.from_numpy(host).pin_memory(), non_blocking=True)
        captured.graph.replay()
        return captured.result

    def _capture(self, size: StepSize, num_columns: int) -> _Captured:
        """Capture while the device goes on with the steps before.

        Not by `torch.cuda.graph`: it waits for the device, collects garbage and gives all unused memory back, which
        takes longer than many steps when a thousand sequences run.
        """
        rows = torch.zeros(num_columns, size.num_rows, dtype=torch.int64, device=self._state.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = self._run_step(rows, size)
            except BaseException:
                self._pool = torch.cuda.graph_pool_handle()  # torch refuses one whose only capture failed
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        captured = self._captured[size] = _Captured(graph, rows, result)
        return captured

    def _run_step(self, rows: torch.Tensor, size: StepSize) -> StepResult:
        if size.num_tokens:
            inputs = inputs_of_prompts(rows, size.num_tokens, self._state, size.max_kv_len)
        else:
            inputs = inputs_of_decode(rows, self._state, size.max_kv_len)
        return self._step(inputs, size.greedy)


def step_size(rows: Sequence[Row], max_batch_size: int, max_seq_len: int, *, greedy: bool) -> StepSize | None:
    """See `StepGraphs.size_of`."""
    if any(row.prompt_logprobs for row in rows):
        return None
    kv_len = max(row.start + row.num_tokens for row in rows)
    if all(row.num_tokens == 1 and row.sample for row in rows):
        num_rows = batch_bucket(len(rows), max_batch_size)
        return StepSize(num_rows, 0, kv_bucket(kv_len, max_seq_len, num_rows), greedy)
    num_tokens = sum(row.num_tokens for row in rows)
    if num_tokens > PROMPT_TOKENS[-1] or len(rows) > PROMPT_ROWS[-1]:
        return None
    num_rows, num_tokens = _next(PROMPT_ROWS, len(rows)), _next(PROMPT_TOKENS, num_tokens)
    return StepSize(num_rows, num_tokens, kv_bucket(kv_len, max_seq_len, num_rows), greedy)


def batch_bucket(num_rows: int, max_batch_size: int) -> int:
    """Rows of the step that runs `num_rows` decode rows: 1, 2, 4, then multiples of about an eighth."""
    if num_rows <= 2:
        return num_rows
    step = max(4, 1 << max(0, (num_rows - 1).bit_length() - 3))
    return min(-(-num_rows // step) * step, max(max_batch_size, num_rows))


def kv_bucket(kv_len: int, max_seq_len: int, num_rows: int) -> int:
    """Longest context of the step that runs rows of up to `kv_len` tokens."""
    if num_rows >= MANY_ROWS:
        return max_seq_len
    return min(max(SMALLEST_KV_BOUND, 1 << (kv_len - 1).bit_length()), max_seq_len)


def _next(sizes: Sequence[int], value: int) -> int:
    return sizes[bisect_left(sizes, value)]


def _host_rows(rows: Sequence[Row], size: StepSize, scratch_slot: int) -> npt.NDArray[np.int64]:
    """[2, R] slots and starts of decode rows (padding starts at -1), or [4, R] slots, starts, lengths, target slots."""
    count = len(rows)
    host = np.zeros((4 if size.num_tokens else 2, size.num_rows), np.int64)
    host[0] = scratch_slot
    host[0, :count] = [row.slot for row in rows]
    host[1, :count] = [row.start for row in rows]
    if size.num_tokens:
        host[2, :count] = [row.num_tokens for row in rows]
        host[3] = scratch_slot
        host[3, :count] = [row.slot if row.sample else scratch_slot for row in rows]
    else:
        host[1, count:] = -1
    return host
