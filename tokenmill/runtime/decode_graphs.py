"""`DecodeGraphs`: steps of one token for each row, captured once for each size and replayed. CUDA only.

A graph is captured when its size is first needed: the batch rounded up to a bucket (padded with the scratch slot), the
longest context rounded up to a power of two. What differs from step to step lies in one small input tensor and in the
slots, both read on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tokenmill.engine.plan import Row
from tokenmill.ops.upload import upload
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_inputs import StepInputs, inputs_of_decode
from tokenmill.sampling.sampled_tokens import SampledTokens

SMALLEST_KV_BOUND = 1024
"""Contexts up to this many tokens share graphs."""


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """What a captured step leaves, overwritten by the next replay of the same graph.

    Args:
        inputs: of all rows, padding included.
        logits: [R, V] float32, for a sampler; None if the tokens were chosen in the graph.
        sampled: the chosen tokens, written to their slots already; None if a sampler has to choose.
    """

    inputs: StepInputs
    logits: torch.Tensor | None
    sampled: SampledTokens | None


DecodeStep = Callable[[StepInputs, bool], DecodeOutput]
"""Runs the model on inputs; with True it also takes the most likely tokens."""


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    rows: torch.Tensor  # [2, R] int64: slots, starts
    output: DecodeOutput


class DecodeGraphs:
    """Captured decode steps.

    Args:
        step: what is captured.
        state: the slots.
        max_batch_size: most rows of a step.
    """

    def __init__(self, step: DecodeStep, state: SlotState, max_batch_size: int) -> None:
        self._step = step
        self._state = state
        self._max_batch_size = max_batch_size
        self._captured: dict[tuple[int, int, bool], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, rows: Sequence[Row], *, greedy: bool) -> DecodeOutput:
        """Replay the graph for `rows`, each of one token; capture it first if its size is new."""
        num_rows = batch_bucket(len(rows), self._max_batch_size)
        max_kv_len = kv_bucket(max(row.start for row in rows) + 1, self._state.max_seq_len)
        host = np.empty((2, num_rows), np.int64)
        host[0], host[1] = self._state.scratch_slot, -1
        host[0, : len(rows)] = [row.slot for row in rows]
        host[1, : len(rows)] = [row.start for row in rows]
        key = (num_rows, max_kv_len, greedy)
        if key not in self._captured:
            self._captured[key] = self._capture(num_rows, max_kv_len, greedy)
        captured = self._captured[key]
        captured.rows.copy_(upload(host, captured.rows.device), non_blocking=True)
        captured.graph.replay()
        return captured.output

    def _capture(self, num_rows: int, max_kv_len: int, greedy: bool) -> _Captured:
        """Run the step once on padding (kernels compile, libraries start), then capture it."""
        rows = torch.empty(2, num_rows, dtype=torch.int64, device=self._state.device)
        rows[0], rows[1] = self._state.scratch_slot, -1

        def step() -> DecodeOutput:
            return self._step(inputs_of_decode(rows[0], rows[1], self._state, max_kv_len), greedy)

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = step()
        return _Captured(graph, rows, output)


def batch_bucket(num_rows: int, max_batch_size: int) -> int:
    """Rows of the graph that runs `num_rows` rows: 1, 2, 4, then multiples of about an eighth."""
    if num_rows <= 2:
        return num_rows
    step = max(4, 1 << max(0, (num_rows - 1).bit_length() - 3))
    return min(-(-num_rows // step) * step, max(max_batch_size, num_rows))


def kv_bucket(kv_len: int, max_seq_len: int) -> int:
    """Longest context of the graph that runs rows of up to `kv_len` tokens."""
    return min(max(SMALLEST_KV_BOUND, 1 << (kv_len - 1).bit_length()), max_seq_len)
