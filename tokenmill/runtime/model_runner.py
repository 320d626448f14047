"""`ModelRunner`: runs batch plans with torch: a model of `models/`, or a program on a GPU. Owns the cache's memory.

A step: compute inputs on the device, run the model, sample, write the tokens back to the slots. Nothing is read back
before `collect`, so the host can prepare the next step meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from tokenmill.attention.base import LayerCache
from tokenmill.engine.plan import BatchPlan, BlockCopy, Row
from tokenmill.layers.forward_batch import ForwardBatch
from tokenmill.ops.argmax import TokenPlaces
from tokenmill.ops.kv_cache import copy_blocks
from tokenmill.ops.platform import is_cuda
from tokenmill.ops.upload import upload
from tokenmill.runtime.device_errors import device_errors
from tokenmill.runtime.phases import phase
from tokenmill.runtime.slot_runner import LaunchedStep, SlotRunner
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_graphs import StepGraphs, StepResult
from tokenmill.runtime.step_inputs import StepInputs, inputs_of_rows
from tokenmill.runtime.step_sizes import SHORT_TOKENS, StepSize, batch_bucket
from tokenmill.sampling.sampled_tokens import TokenReadback
from tokenmill.sampling.slot_params import SlotSamplingParams


class StepModel(Protocol):
    """What computes a step: `models.base.CausalLM`, or `TorchProgram`."""

    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        """What `compute_logits` needs of each wanted token, [n, columns]; writes keys and values to the caches."""
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of what a call gave, [n, columns], to [n, V] float32."""
        ...


class ModelRunner(SlotRunner):
    """Runs plans; see `engine.plan.Runner` for the contract.

    Args:
        model: loaded and finalized.
        caches: keys and values of each layer.
        slots: tokens and block tables by slot.
        sampling: sampling parameters by slot.
        use_graphs: replay steps from CUDA graphs, on a GPU.
        max_graph_tokens: of the largest step with prompts that is captured; see `step_sizes`.
    """

    def __init__(
        self,
        model: StepModel,
        caches: tuple[LayerCache, ...],
        slots: SlotState,
        sampling: SlotSamplingParams,
        *,
        use_graphs: bool = True,
        max_graph_tokens: int = SHORT_TOKENS[-1],
    ) -> None:
        super().__init__(slots, sampling)
        self._model = model
        self._caches = caches
        self._graphs: StepGraphs | None = None
        if use_graphs and is_cuda(slots.device):
            self._graphs = StepGraphs(self._step, slots, slots.scratch_slot, max_graph_tokens)

    def first_runs(self) -> list[Callable[[], object]]:
        """Steps between which kernels differ, each to be run once, beside each other, by `run_together`.

        They are those of the scratch slot, whose tokens and cache block 0 are nobody's.
        """
        captured_steps = [] if self._graphs is None else self._graphs.first_runs()
        return [*(partial(self._run_prompts, rows) for rows in self._prompts()), *captured_steps]

    def use_caches(self, caches: tuple[LayerCache, ...]) -> None:
        """Take these caches in the place of those that first runs have seen; before the first plan and `warm_up`."""
        self._caches = caches

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture steps, so that no request waits for it; once, after the first runs, before the first plan."""
        if self._graphs is not None:
            self._graphs.capture_at_start()

    def _prompts(self) -> list[list[Row]]:
        """Prompts between which kernels differ: long and short, with and without history."""
        slot, longest = self._slots.scratch_slot, self._slots.max_seq_len
        spans = [(0, 8), (0, 128), (128, 8), (128, 128), (256, 1)]
        return [[Row(slot, start, num_tokens, True)] for start, num_tokens in spans if start + num_tokens <= longest]

    def _run_prompts(self, rows: list[Row]) -> None:
        inputs = inputs_of_rows(rows, self._slots)
        self._sampler.most_likely(self._model.compute_logits(self._last_hidden(inputs)))

    @torch.inference_mode()
    def launch(self, plan: BatchPlan) -> LaunchedStep:
        """Start the step; on a GPU this returns before it is computed."""
        with device_errors():
            return self._launch(plan)

    def _launch(self, plan: BatchPlan) -> LaunchedStep:
        self._apply_changes(plan)
        if self._graphs is not None:
            greedy = self._sampling.is_plain_greedy([row.slot for row in plan.rows])
            size = self._graphs.size_of(plan.rows, greedy=greedy)
            if size is not None:
                return self._launch_graph(plan, self._graphs, size)
        inputs = inputs_of_rows(plan.rows, self._slots)
        sampled_rows = tuple(index for index, row in enumerate(plan.rows) if row.sample)
        prompt_logprobs = {}
        if any(row.prompt_logprobs for row in plan.rows):
            hidden = self._forward(inputs)
            prompt_logprobs = self._prompt_logprobs(plan.rows, hidden, self._model.compute_logits)
            hidden = inputs.last_of_rows(hidden)
        else:
            hidden = self._last_hidden(inputs)
        return LaunchedStep(
            plan=plan,
            sampled_rows=sampled_rows,
            readback=self._sample(plan.rows, sampled_rows, inputs, hidden) if sampled_rows else None,
            prompt_logprobs=prompt_logprobs,
        )

    # ---- parts of a launch -----------------------------------------------------------------------------------

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        pairs = np.array([[copy.source, copy.destination] for copy in copies], np.int64)
        source, destination = upload(pairs, self._slots.device).unbind(1)
        copy_blocks(self._caches, source, destination)

    def _forward(self, inputs: StepInputs, wanted: torch.Tensor | None = None) -> torch.Tensor:  # [n, hidden]
        with phase("model"):
            return self._model(ForwardBatch(inputs.input_ids, inputs.positions, inputs.attention, self._caches, wanted))

    def _last_hidden(self, inputs: StepInputs) -> torch.Tensor:  # [R, hidden]
        """Of each row's last token; of the others the last layer computes keys and values alone."""
        num_rows = inputs.last_token_index.shape[0]
        if inputs.attention.num_decode_rows == num_rows:
            return self._forward(inputs)
        wanted = functional.pad(inputs.last_token_index, (0, self._num_more(num_rows)))
        return self._forward(inputs, wanted)[:num_rows]

    def _num_more(self, num_rows: int) -> int:
        """Rows to add on a GPU, so that products have as many as a captured step has.

        A library that meets a new number of rows may load another kernel, which holds up a step by a tenth of a second.
        """
        return 0 if self._graphs is None else batch_bucket(num_rows, self._slots.scratch_slot) - num_rows

    def _sample(
        self, rows: Sequence[Row], sampled_rows: tuple[int, ...], inputs: StepInputs, hidden: torch.Tensor
    ) -> TokenReadback:
        """Tokens of the sampled rows, written to their slots as the next step's input; hidden: [R, hidden_size]."""
        slots, positions = inputs.slots, inputs.next_positions
        if len(sampled_rows) < len(rows):
            index = upload(np.array(sampled_rows, np.int64), slots.device)
            hidden, slots, positions = hidden[index], slots[index], positions[index]
        logits = self._logits(hidden)
        return self._choose(logits, slots, positions, [rows[row] for row in sampled_rows])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:  # [n, V]
        """Logits of n rows, computed with `_num_more` rows more."""
        num_rows = hidden.shape[0]
        hidden = functional.pad(hidden, (0, 0, 0, self._num_more(num_rows)))
        return self._model.compute_logits(hidden)[:num_rows]

    # ---- steps from graphs -----------------------------------------------------------------------------------

    def _launch_graph(self, plan: BatchPlan, graphs: StepGraphs, size: StepSize) -> LaunchedStep:
        """A step of a size that is captured."""
        rows = plan.rows
        sampled_rows = tuple(index for index, row in enumerate(rows) if row.sample)
        with phase("launch a graph"):
            result = graphs.run(rows, size)
        if not sampled_rows:
            return LaunchedStep(plan, (), None, {})
        if result.sampled is not None:
            # Rows that do not sample gave a token, too, which went nowhere: all rows are read, and theirs left out.
            return LaunchedStep(plan, sampled_rows, TokenReadback(result.sampled.first(len(rows))), {}, reads_all=True)
        assert result.hidden is not None
        index = upload(np.array(sampled_rows, np.int64), self._slots.device)
        slots, positions = result.slots[index], result.next_positions[index]
        logits = self._logits(result.hidden[index])
        readback = self._choose(logits, slots, positions, [rows[row] for row in sampled_rows])
        return LaunchedStep(plan, sampled_rows, readback, {})

    def _step(self, inputs: StepInputs, greedy: bool) -> StepResult:
        """What is captured: the model up to each row's last hidden state, and for greedy rows logits and choice.

        Logits for a sampler are not: a graph holds on to what it returns, and they are half a gigabyte for 1,000 rows.
        """
        hidden = self._last_hidden(inputs)
        if not greedy:
            return StepResult(inputs.slots, inputs.next_positions, hidden, None)
        places = TokenPlaces(self._slots.token_ids, inputs.target_slots, inputs.next_positions)
        sampled = self._sampler.most_likely(self._model.compute_logits(hidden), places)
        return StepResult(inputs.slots, inputs.next_positions, None, sampled)
