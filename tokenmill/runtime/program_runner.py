"""`ProgramRunner`: runs batch plans with a program executor on the CPU.

All that happens on the host in a step is a few numpy operations: the step's integers come from the slots, one call
computes it, and where every row takes the most likely token, no tensor library is asked for it. Such steps are repeated
where the plan allows it: the next one begins microseconds after the one before, and the engine hears of both at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch

from tokenmill.engine.plan import BatchPlan, BlockCopy, Row, RowOutput, StepOutput
from tokenmill.runtime.device_errors import device_errors
from tokenmill.runtime.phases import phase
from tokenmill.runtime.program_executor import ProgramExecutor, Values
from tokenmill.runtime.slot_runner import NOT_FINITE, LaunchedStep, SlotRunner
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_arrays import Integers
from tokenmill.sampling.slot_params import SlotSamplingParams

MAX_REPEATS: Final = 16
"""Steps between two looks of the engine, which cost it 0.3 ms with one sequence and 0.8 with 16."""

MAX_REPEAT_SECONDS: Final = 0.016
"""Time of all of them together: that of one picture on a screen, so streamed text looks no different."""


class ProgramRunner(SlotRunner):
    """Runs plans; see `engine.plan.Runner` and `RepeatingRunner` for the contract.

    Args:
        executor: computes steps; owns the cache.
        slots: tokens and block tables by slot, on the CPU.
        sampling: sampling parameters by slot.
        clock: seconds.
    """

    def __init__(
        self,
        executor: ProgramExecutor,
        slots: SlotState,
        sampling: SlotSamplingParams,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(slots, sampling)
        self._executor = executor
        self._clock = clock
        self._is_interrupted: Callable[[], bool] = lambda: False
        self._token_ids = slots.token_ids.numpy()  # the same memory
        self._block_tables = slots.block_tables.numpy()

    @property
    def max_repeats(self) -> int:
        """See `RepeatingRunner`."""
        return MAX_REPEATS

    def interrupt_when(self, is_interrupted: Callable[[], bool]) -> None:
        """See `RepeatingRunner`."""
        self._is_interrupted = is_interrupted

    def launch(self, plan: BatchPlan) -> LaunchedStep:
        """Compute the step."""
        with device_errors():
            return self._launch(plan)

    def _launch(self, plan: BatchPlan) -> LaunchedStep:
        rows = plan.rows
        if plan.new_slots or plan.new_blocks or plan.block_copies:
            with torch.inference_mode():
                self._apply_changes(plan)
        sampled_rows = tuple(index for index, row in enumerate(rows) if row.sample)
        chosen = rows if len(sampled_rows) == len(rows) else tuple(rows[index] for index in sampled_rows)
        is_greedy = self._sampling.is_plain_greedy([row.slot for row in chosen])
        repeats = plan.max_repeats if is_greedy else 1
        self._executor.arrays.fill(rows, self._token_ids, self._block_tables, max_repeats=repeats)
        started = self._clock()
        if not is_greedy or any(row.prompt_logprobs for row in rows):
            with phase("program"):
                logits = self._executor.run()
            return self._launch_sampled(plan, sampled_rows, chosen, logits)
        with phase("program"):
            self._executor.run_tokens()
        tokens = self._executor.most_likely().copy()[:, None]  # [sampled rows, 1]
        if repeats > 1 and tokens.min() >= 0:
            tokens = self._repeat(tokens, repeats, started)
        return LaunchedStep(plan, sampled_rows, None, {}, output=self._take(plan, sampled_rows, chosen, tokens))

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        self._executor.copy_blocks([copy.source for copy in copies], [copy.destination for copy in copies])

    def _repeat(self, tokens: Integers, repeats: int, started: float) -> Integers:
        """Go on with the tokens [R, 1] that the step gave; returns them and those that follow, [R, repeats or less].

        A step without finite logits is not told: it is the next one, and nothing else comes then.
        """
        found = [tokens[:, 0]]
        duration = self._clock() - started  # of one step
        while len(found) < repeats and not self._is_interrupted():
            if self._clock() - started + duration > MAX_REPEAT_SECONDS:
                break
            self._executor.repeat()
            following = self._executor.most_likely()
            if following.min() < 0:
                break
            found.append(following.copy())
        return np.stack(found, axis=1)

    def _take(
        self, plan: BatchPlan, sampled_rows: tuple[int, ...], rows: Sequence[Row], tokens: Integers
    ) -> StepOutput:
        """Write the tokens [R, steps] of the sampled rows to their slots, and answer."""
        outputs = [RowOutput()] * len(plan.rows)
        for index, row, found in zip(sampled_rows, rows, tokens.tolist(), strict=True):
            end = row.start + row.num_tokens
            if found[0] < 0:
                self._token_ids[row.slot, end] = 0
                outputs[index] = RowOutput(error=NOT_FINITE)
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
