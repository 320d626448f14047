"""`StepGraphs`: steps captured as CUDA graphs by their size and replayed, so that a step costs the host one launch.

A step is padded up to the next size (`step_sizes`): rows with those of the scratch slot, tokens of prompts with tokens
of a scratch row. What differs from step to step lies in one small input tensor and in the slots, both read on the
device. Greedy decode steps and the largest step with prompts are captured when the engine starts. Another size runs as
a larger one if one is captured, else eagerly (kernels compile, libraries start); when it comes again it is captured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from tokenmill.engine.plan import Row
from tokenmill.ops.library_product import measure_products
from tokenmill.ops.upload import upload
from tokenmill.runtime import step_sizes
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_inputs import (
    DECODE,
    PADDING,
    WITH_HISTORY,
    WITHOUT_HISTORY,
    StepInputs,
    inputs_of_decode,
    inputs_of_prompts,
)
from tokenmill.runtime.step_sizes import StepSize, batch_bucket, kv_bucket, step_size
from tokenmill.sampling.sampled_tokens import SampledTokens

logger = logging.getLogger(__name__)

COMPILED_ROWS = (1, 2, 4, 16, 32, 64, 128, 256)
"""Numbers of decode rows from which on other kernels are used, or other blocks, or arguments of other divisors."""

MAX_PROMPT_GRAPHS = 48
"""Of steps with prompts, of all sizes: what each takes beside the memory that all share is small, but not nothing."""

RUNS_IN_LARGER = (8, 3)
"""How often a size, of decode and of prompts, runs as a larger one that is captured before it is captured itself: the
first run of a size and its capture take the host as long as ten replays of a decode step."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves; of a captured one, overwritten by the next replay of the same graph.

    Args:
        slots: [R] of all rows, padding included.
        next_positions: [R], where each row's token goes.
        hidden: [R, hidden_size] of each row's last token, for a sampler; None if the tokens were chosen in the step.
        sampled: the chosen tokens, written to their slots already; None if a sampler has to choose.
    """

    slots: torch.Tensor
    next_positions: torch.Tensor
    hidden: torch.Tensor | None
    sampled: SampledTokens | None


Step = Callable[[StepInputs, bool], StepResult]
"""Runs the model on inputs; with True it also takes the most likely tokens."""


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    rows: torch.Tensor  # [columns, R] int64: see `host_rows`
    result: StepResult


class StepGraphs:
    """Captured steps by size.

    Args:
        step: what is captured.
        state: the slots.
        max_batch_size: most rows of a step.
        max_tokens: of the largest step with prompts that is captured.
    """

    def __init__(
        self, step: Step, state: SlotState, max_batch_size: int, max_tokens: int = step_sizes.SHORT_TOKENS[-1]
    ) -> None:
        self._step = step
        self._state = state
        self._max_batch_size = max_batch_size
        self._max_tokens = max_tokens
        self._captured: dict[StepSize, _Captured] = {}
        self._has_run: set[StepSize] = set()
        self._num_in_larger: dict[StepSize, int] = {}
        self._captures_prompts = True
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(state.device)  # type: ignore[no-untyped-call]

    def size_of(self, rows: Sequence[Row], *, greedy: bool) -> StepSize | None:
        """The size under which a step with these rows runs; None if it is not one to capture."""
        state = self._state
        size = step_size(rows, self._max_batch_size, state.max_seq_len, self._max_tokens, greedy=greedy)
        if size is None or size in self._captured or self._may_capture(size) or self._larger(size) is not None:
            return size
        return None

    def next_run(self, size: StepSize) -> tuple[str, StepSize]:
        """How the next step of this size runs: `first` (eagerly), `capture` or `replay`, and under which size."""
        if size in self._captured:
            return "replay", size
        larger = self._larger(size)
        if larger is not None:
            num_runs = self._num_in_larger.get(size, 0)
            if num_runs < RUNS_IN_LARGER[bool(size.num_tokens)] or not self._may_capture(size):
                return "replay", larger
        return ("capture" if size in self._has_run else "first"), size

    def first_runs(self) -> list[Callable[[], object]]:
        """Steps between which kernels differ, to be run once. Their rows are padding: nothing is changed."""
        sizes = self._decode_sizes()
        few = [size for size in sizes if size.num_rows in COMPILED_ROWS or size == sizes[0]]
        return [partial(self._run_first, size) for size in (*self._largest_with_prompts(), *few)]

    def capture_at_start(self) -> None:
        """Capture the largest step with prompts, and greedy decode steps of all numbers of rows, of short contexts
        where that makes a difference.

        Largest first, so that the others find room in its memory. All have run before, so that products of all sizes
        have been met, and are measured.
        """
        sizes = (*self._largest_with_prompts(), *self._decode_sizes())
        for size in sizes:
            if size not in self._has_run:
                self._run_first(size)
        measure_products(self._state.device)
        for size in sizes:
            self._try_capture(size)

    def _largest_with_prompts(self) -> list[StepSize]:
        """It, or nothing if only short steps with prompts are captured."""
        if self._max_tokens <= step_sizes.SHORT_TOKENS[-1]:
            return []
        batch, state = self._max_batch_size, self._state
        return [step_sizes.large_size(batch, self._max_tokens, batch, state.max_seq_len, greedy=True)]

    def _decode_sizes(self) -> list[StepSize]:
        """Largest first."""
        buckets = {batch_bucket(num_rows, self._max_batch_size) for num_rows in range(1, self._max_batch_size + 1)}
        max_seq_len = self._state.max_seq_len
        return [
            StepSize(num_rows, 0, kv_bucket(1, max_seq_len, num_rows), greedy=True)
            for num_rows in sorted(buckets, reverse=True)
        ]

    def _may_capture(self, size: StepSize) -> bool:
        if not size.num_tokens:
            return True
        return self._captures_prompts and sum(bool(one.num_tokens) for one in self._captured) < MAX_PROMPT_GRAPHS

    def _larger(self, size: StepSize) -> StepSize | None:
        """The smallest captured size that this one can run in."""
        return min((one for one in self._captured if one.holds(size)), default=None)

    def run(self, rows: Sequence[Row], size: StepSize) -> StepResult:
        """Run the step of these rows."""
        how, to_run = self.next_run(size)
        if to_run != size:
            self._num_in_larger[size] = self._num_in_larger.get(size, 0) + 1
        host = host_rows(rows, to_run, self._state.scratch_slot)
        if how == "first" or (how == "capture" and not self._try_capture(to_run)):
            self._has_run.add(to_run)
            return self._run_step(upload(host, self._state.device), to_run)
        captured = self._captured[to_run]
        captured.rows.copy_(torch.from_numpy(host).pin_memory(), non_blocking=True)
        captured.graph.replay()
        return captured.result

    def _run_first(self, size: StepSize) -> None:
        """Run a step of padding alone."""
        self._has_run.add(size)
        self._run_step(upload(host_rows((), size, self._state.scratch_slot), self._state.device), size)

    def _try_capture(self, size: StepSize) -> bool:
        """Capture, if it can be done. When a step with prompts fails, such steps stay eager from then on.

        A decode step that finds no memory raises: with fewer rows it may.
        """
        try:
            self._captured[size] = self._capture(size)
        except RuntimeError as error:
            if not size.num_tokens:
                raise
            logger.warning("Steps with prompts are not captured any more: %s", error)
            self._captures_prompts = False
        return size in self._captured

    def _capture(self, size: StepSize) -> _Captured:
        """Capture while the device goes on with the steps before.

        Not by `torch.cuda.graph`: it waits for the device, collects garbage and gives all unused memory back, which
        takes longer than many steps when a thousand sequences run.
        """
        rows = torch.zeros(_num_columns(size), size.num_rows, dtype=torch.int64, device=self._state.device)
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
        return _Captured(graph, rows, result)

    def _run_step(self, rows: torch.Tensor, size: StepSize) -> StepResult:
        if size.num_tokens:
            inputs = inputs_of_prompts(rows, size.num_tokens, self._state, size.max_kv_len, size.num_prompts)
        else:
            inputs = inputs_of_decode(rows, self._state, size.max_kv_len)
        return self._step(inputs, size.greedy)


def _num_columns(size: StepSize) -> int:
    if not size.num_tokens:
        return 2
    return 5 if size.num_prompts else 4


def host_rows(rows: Sequence[Row], size: StepSize, scratch_slot: int) -> npt.NDArray[np.int64]:
    """[2, R] slots and starts of decode rows (padding starts at -1), or [4, R] slots, starts, lengths, target slots,
    or [5, R] with kinds of rows too."""
    count = len(rows)
    host = np.zeros((_num_columns(size), size.num_rows), np.int64)
    host[0] = scratch_slot
    host[0, :count] = [row.slot for row in rows]
    host[1, :count] = [row.start for row in rows]
    if not size.num_tokens:
        host[1, count:] = -1
        return host
    host[2, :count] = [row.num_tokens for row in rows]
    host[3] = scratch_slot
    host[3, :count] = [row.slot if row.sample else scratch_slot for row in rows]
    if size.num_prompts:
        host[4] = PADDING
        host[4, :count] = _kinds(rows)
    return host


def _kinds(rows: Sequence[Row]) -> list[int]:
    """Of a plan's rows, in their order: only those at the end are told to have no history."""
    kinds = [DECODE if row.num_tokens == 1 else WITH_HISTORY for row in rows]
    for index in reversed(range(len(rows))):
        if kinds[index] == DECODE or rows[index].start:
            break
        kinds[index] = WITHOUT_HISTORY
    return kinds
