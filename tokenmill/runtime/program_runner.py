"""`ProgramRunner`: runs batch plans with a program executor on the CPU.

All that happens on the host in a step is a few numpy operations: the step's integers come from the slots, one call
computes it, and where every row takes the most likely token, no tensor library is asked for it. Such steps are repeated
where the plan allows it: the next one begins microseconds after the one before, and the engine hears of both at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from tokenmill.engine.plan import BatchPlan, BlockCopy, Interruption, NewSlot, Row, RowOutput, StepOutput
from tokenmill.runtime.device_errors import device_errors
from tokenmill.runtime.phases import phase
from tokenmill.runtime.program_executor import ProgramExecutor, Values
from tokenmill.runtime.slot_runner import LaunchedStep, SlotRunner, not_finite
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_arrays import MAX_STEPS, NO_TOKEN, NUM_END_IDS, Integers
from tokenmill.sampling.slot_params import SlotSamplingParams

WATCHED_SECONDS: Final = 0.016
"""Time of all repetitions of a step together: that of one picture on a screen, so streamed text looks no different."""

UNWATCHED_SECONDS: Final = 0.1
"""The same where nobody looks. Whoever wants something of the engine interrupts it in any case."""


class ProgramRunner(SlotRunner):
    """Runs plans; see `engine.plan.Runner` and `RepeatingRunner` for the contract.

    Args:
        executor: computes steps; owns the cache.
        slots: tokens and block tables by slot, on the CPU.
        sampling: sampling parameters by slot.
    """

    def __init__(self, executor: ProgramExecutor, slots: SlotState, sampling: SlotSamplingParams) -> None:
        super().__init__(slots, sampling)
        self._executor = executor
        self._interruption = Interruption()
        self._token_ids = slots.token_ids.numpy()  # the same memory
        self._block_tables = slots.block_tables.numpy()
        self._end_ids: Integers = np.full((len(self._token_ids), NUM_END_IDS), NO_TOKEN, np.int32)

    @property
    def max_repeats(self) -> int:
        """See `RepeatingRunner`."""
        return MAX_STEPS

    def interrupt_when(self, interruption: Interruption) -> None:
        """See `RepeatingRunner`."""
        self._interruption = interruption

    def launch(self, plan: BatchPlan) -> LaunchedStep:
        """Compute the step."""
        with device_errors():
            return self._launch(plan)

    def _launch(self, plan: BatchPlan) -> LaunchedStep:
        rows = plan.rows
        if plan.new_slots or plan.new_blocks or plan.block_copies:
            with torch.inference_mode():
                self._apply_changes(plan)
            self._set_end_ids(plan.new_slots)
        sampled_rows = tuple(index for index, row in enumerate(rows) if row.sample)
        chosen = rows if len(sampled_rows) == len(rows) else tuple(rows[index] for index in sampled_rows)
        is_greedy = self._sampling.is_plain_greedy([row.slot for row in chosen])
        repeats = plan.max_repeats if is_greedy else 1
        self._executor.arrays.fill(rows, self._token_ids, self._block_tables, self._end_ids, max_repeats=repeats)
        if not is_greedy or any(row.prompt_logprobs for row in rows):
            with phase("program"):
                logits = self._executor.run()
            return self._launch_sampled(plan, sampled_rows, chosen, logits)
        with phase("program"):
            seconds = WATCHED_SECONDS if plan.is_watched else UNWATCHED_SECONDS
            tokens = self._executor.run_steps(repeats, seconds, self._interruption)
        return LaunchedStep(plan, sampled_rows, None, {}, output=self._take(plan, sampled_rows, chosen, tokens))

    def _set_end_ids(self, new_slots: Sequence[NewSlot]) -> None:
        for new in new_slots:
            self._end_ids[new.slot] = (*new.end_ids[:NUM_END_IDS], *[NO_TOKEN] * (NUM_END_IDS - len(new.end_ids)))

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        self._executor.copy_blocks([copy.source for copy in copies], [copy.destination for copy in copies])

    def _take(
        self, plan: BatchPlan, sampled_rows: tuple[int, ...], rows: Sequence[Row], tokens: Integers
    ) -> StepOutput:
        """Write the tokens [R, steps] of the sampled rows to their slots, and answer."""
        outputs = [RowOutput()] * len(plan.rows)
        for index, row, found in zip(sampled_rows, rows, tokens.tolist(), strict=True):
            end = row.start + row.num_tokens
            if found[0] < 0:
                self._token_ids[row.slot, end] = 0
                outputs[index] = RowOutput(error=not_finite())
                continue
            self._token_ids[row.slot, end : end + len(found)] = found
            outputs[index] = RowOutput(found[0], more_token_ids=tuple(found[1:]))
        return StepOutput(tuple(outputs))

    @torch.inference_mode()
    def _launch_sampled(
        self, plan: BatchPlan, sampled_rows: tuple[int, ...], rows: Sequence[Row], logits: Values
    ) -> LaunchedStep:
        """The sampler chooses; log-probabilities of prompts are computed."""
        readback = None
        if rows:
            slots = torch.tensor([row.slot for row in rows])
            positions = torch.tensor([row.start + row.num_tokens for row in rows])
            readback = self._choose(torch.from_numpy(logits), slots, positions, rows)
        tokens = torch.arange(plan.num_tokens)
        return LaunchedStep(plan, sampled_rows, readback, self._prompt_logprobs(plan.rows, tokens, self._logits_at))

    def _logits_at(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._executor.logits_at(tokens.tolist()))
