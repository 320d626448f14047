"""`ProgramRunner`: runs batch plans with a program executor on the CPU.

All that happens on the host in a step is a few numpy operations: the step's integers come from the slots, one call
computes it, and where every row takes the most likely token, no tensor library is asked for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tokenmill.engine.plan import BatchPlan, BlockCopy, Row
from tokenmill.runtime.device_errors import device_errors
from tokenmill.runtime.phases import phase
from tokenmill.runtime.program_executor import ProgramExecutor, Values
from tokenmill.runtime.slot_runner import LaunchedStep, SlotRunner
from tokenmill.runtime.slot_state import SlotState
from tokenmill.sampling.sampled_tokens import SampledRow
from tokenmill.sampling.slot_params import SlotSamplingParams

_INVALID = SampledRow(None, None)


@dataclass(frozen=True, slots=True)
class HostTokens:
    """Tokens that are on the host already; None for a row whose logits are not finite."""

    token_ids: tuple[int | None, ...]

    def wait(self) -> list[SampledRow]:
        """One answer for each row."""
        return [_INVALID if token is None else SampledRow(token, None) for token in self.token_ids]


class ProgramRunner(SlotRunner):
    """Runs plans; see `engine.plan.Runner` for the contract.

    Args:
        executor: computes steps; owns the cache.
        slots: tokens and block tables by slot, on the CPU.
        sampling: sampling parameters by slot.
    """

    def __init__(self, executor: ProgramExecutor, slots: SlotState, sampling: SlotSamplingParams) -> None:
        super().__init__(slots, sampling)
        self._executor = executor
        self._token_ids = slots.token_ids.numpy()  # the same memory
        self._block_tables = slots.block_tables.numpy()

    def launch(self, plan: BatchPlan) -> LaunchedStep:
        """Compute the step."""
        with device_errors():
            return self._launch(plan)

    def _launch(self, plan: BatchPlan) -> LaunchedStep:
        rows = plan.rows
        with torch.inference_mode():
            self._apply_changes(plan)
        self._executor.arrays.fill(rows, self._token_ids, self._block_tables)
        with phase("program"):
            logits = self._executor.run()
        sampled_rows = tuple(index for index, row in enumerate(rows) if row.sample)
        chosen = rows if len(sampled_rows) == len(rows) else tuple(rows[index] for index in sampled_rows)
        if not any(row.prompt_logprobs for row in rows) and self._sampling.is_plain_greedy([r.slot for r in chosen]):
            return LaunchedStep(plan, sampled_rows, self._most_likely(logits, chosen) if chosen else None, {})
        return self._launch_sampled(plan, sampled_rows, chosen, logits)

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        self._executor.copy_blocks([copy.source for copy in copies], [copy.destination for copy in copies])

    def _most_likely(self, logits: Values, rows: Sequence[Row]) -> HostTokens:
        """The most likely token of each row, of equal ones the first, written to its slot."""
        found: list[int | None] = []
        for row, row_logits in zip(rows, logits, strict=True):
            token = int(row_logits.argmax())  # of the first NaN, if there is one
            is_finite = bool(np.isfinite(row_logits[token]))
            self._token_ids[row.slot, row.start + row.num_tokens] = token if is_finite else 0
            found.append(token if is_finite else None)
        return HostTokens(tuple(found))

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
