"""`ModelRunner`: runs batch plans with a torch model. Owns the slots' state, the cache's memory and the sampler.

A step: apply what changed, compute inputs on the device, run the model, sample, write the tokens back to the slots.
Nothing is read back before `collect`, so the host can prepare the next step meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenmill.attention.base import LayerCache
from tokenmill.engine.plan import BatchPlan, RowOutput, StepOutput
from tokenmill.layers.forward_batch import ForwardBatch
from tokenmill.models.base import CausalLM
from tokenmill.runtime.slot_state import SlotState, StepInputs
from tokenmill.sampling.logprobs import PromptLogprobs
from tokenmill.sampling.sampler import SampledTokens, Sampler


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step under way: the plan and the tensors that `collect` reads."""

    plan: BatchPlan
    sampled_rows: tuple[int, ...]
    sampled: SampledTokens | None
    prompt_logprobs: dict[int, PromptLogprobs]


class ModelRunner:
    """Runs plans. See `engine.plan.Runner`.

    Args:
        model: loaded and finalized.
        caches: keys and values of each layer.
        slots: state by slot.
        sampler: with room for the same slots.
    """

    def __init__(self, model: CausalLM, caches: tuple[LayerCache, ...], slots: SlotState, sampler: Sampler) -> None:
        self._model = model
        self._caches = caches
        self._slots = slots
        self._sampler = sampler
        self._num_prompt_tokens: dict[int, int] = {}

    def run(self, plan: BatchPlan) -> StepOutput:
        """Launch and collect."""
        return self.collect(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: BatchPlan) -> LaunchedStep:
        """Start the step; on a GPU this returns before it is computed."""
        self._apply_changes(plan)
        if not plan.rows:
            return LaunchedStep(plan, (), None, {})
        inputs = StepInputs(plan.rows, self._slots)
        batch = ForwardBatch(inputs.input_ids, inputs.positions, inputs.attention, self._caches)
        hidden = self._model(batch)  # [T, hidden]
        return LaunchedStep(
            plan=plan,
            sampled_rows=tuple(index for index, row in enumerate(plan.rows) if row.sample),
            sampled=self._sample(plan, inputs, hidden),
            prompt_logprobs=self._prompt_logprobs(plan, hidden),
        )

    def collect(self, pending: LaunchedStep) -> StepOutput:
        """Read what the step gave; waits for the device."""
        rows = [RowOutput() for _ in pending.plan.rows]
        return StepOutput(tuple(rows))
