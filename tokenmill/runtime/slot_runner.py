"""`SlotRunner`: what all runners of batch plans share: the slots' state, the choice of tokens, reading a step's answer.

A runner adds the computation: `ModelRunner` with torch, `ProgramRunner` with one native call. Tokens stay in the slots
for the next step, so nothing is read back before `collect`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tokenmill.engine.plan import BatchPlan, BlockCopy, NewSlot, Row, RowOutput, StepOutput
from tokenmill.errors import AllTokensBannedError, InvalidLogitsError
from tokenmill.runtime.device_errors import device_errors
from tokenmill.runtime.phases import phase
from tokenmill.runtime.slot_state import SlotState
from tokenmill.sampling.logprobs import LogprobTensors, prompt_logprobs, to_token_logprobs
from tokenmill.sampling.sampled_tokens import SampledRow, TokenReadback
from tokenmill.sampling.sampler import Sampler
from tokenmill.sampling.slot_params import SlotSamplingParams


def not_finite() -> InvalidLogitsError:
    """Why a row has no token: the model's fault."""
    return InvalidLogitsError("The model gave no finite logits for this request.")


def all_banned() -> AllTokensBannedError:
    """Why a row has no token: the request's fault."""
    return AllTokensBannedError(
        "No token may come next: bad words, and tokens that would end the answer before min_tokens, are all that the "
        "model could say at this place.",
        remedy="Ban fewer.",
    )


class Readback(Protocol):
    """Tokens on their way to the host."""

    def wait(self) -> list[SampledRow]:
        """Wait for them; in the order of the batch."""
        ...


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step under way.

    Args:
        plan: what was launched.
        sampled_rows: indices of the plan's rows that sample.
        readback: their tokens, on the way to the host; None when no row samples.
        prompt_logprobs: by row index, for the rows that asked: the tensors, and how many most likely tokens to tell.
        reads_all: whether `readback` holds all rows of the plan, not the sampled ones alone.
        output: the whole answer, if it is known already.
    """

    plan: BatchPlan
    sampled_rows: tuple[int, ...]
    readback: Readback | None
    prompt_logprobs: dict[int, tuple[LogprobTensors, int]]
    reads_all: bool = False
    output: StepOutput | None = None


class SlotRunner(ABC):
    """Applies what a plan changes, and chooses tokens; see `engine.plan.Runner` for the contract.

    Args:
        slots: tokens and block tables by slot.
        sampling: sampling parameters by slot.
    """

    def __init__(self, slots: SlotState, sampling: SlotSamplingParams) -> None:
        self._slots = slots
        self._sampling = sampling
        self._sampler = Sampler(sampling)
        self._assigned: dict[int, NewSlot] = {}

    def run(self, plan: BatchPlan) -> StepOutput:
        """Launch and collect."""
        return self.collect(self.launch(plan))

    @abstractmethod
    def launch(self, plan: BatchPlan) -> LaunchedStep:
        """Start the step."""

    def collect(self, pending: LaunchedStep) -> StepOutput:
        """Read what the step gave; waits for the device."""
        if pending.output is not None:
            return pending.output
        with device_errors():
            return self._collect(pending)

    def _collect(self, pending: LaunchedStep) -> StepOutput:
        rows = pending.plan.rows
        outputs = [RowOutput()] * len(rows)  # one for all that gave nothing
        of_prompts = {
            index: tuple(to_token_logprobs(tensors.cpu(), [num_top] * len(tensors.token_ids)))
            for index, (tensors, num_top) in pending.prompt_logprobs.items()
        }
        for index, entries in of_prompts.items():
            outputs[index] = RowOutput(prompt_logprobs=entries)
        with phase("wait for tokens"):
            sampled = pending.readback.wait() if pending.readback is not None else []
        if pending.reads_all:
            sampled = [sampled[index] for index in pending.sampled_rows]
        for index, (token_id, logprobs, is_banned) in zip(pending.sampled_rows, sampled, strict=True):
            error = None if token_id is not None else all_banned() if is_banned else not_finite()
            outputs[index] = RowOutput(token_id, logprobs, of_prompts.get(index, ()), error)
        return StepOutput(tuple(outputs))

    # ---- for subclasses --------------------------------------------------------------------------------------

    @abstractmethod
    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy cache blocks in all layers."""

    def _apply_changes(self, plan: BatchPlan) -> None:
        """Everything that a plan does before its rows are computed."""
        with phase("apply changes"):
            self._change(plan)

    def _change(self, plan: BatchPlan) -> None:
        if plan.block_copies:
            self._copy_blocks(plan.block_copies)
        if plan.new_slots:
            self._slots.assign(plan.new_slots)
            self._sampling.assign(plan.new_slots)
            self._assigned.update((new.slot, new) for new in plan.new_slots)
        self._slots.append_blocks(plan.new_blocks)

    def _choose(
        self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, rows: Sequence[Row]
    ) -> TokenReadback:
        """Tokens of `rows`, written to their slots as the next step's input.

        Args:
            logits: [R, V] float32.
            slots, positions: [R] int64, where each token goes.
            rows: that sample.
        """
        with phase("sample"):
            sampled = self._sampler.sample(
                logits,
                slots,
                [row.slot for row in rows],
                positions,
                self._slots.token_ids,
                max_position=max(row.start + row.num_tokens for row in rows),
            )
        self._slots.token_ids[slots, positions] = sampled.token_ids
        return TokenReadback(sampled)

    def _prompt_logprobs(
        self, rows: Sequence[Row], hidden: torch.Tensor, compute_logits: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[int, tuple[LogprobTensors, int]]:
        """Log-probabilities of the prompt tokens that follow each position of the rows that asked.

        Args:
            rows: of the step.
            hidden: [T, ...] of the step's tokens.
            compute_logits: rows of `hidden` to logits [n, V] float32.
        """
        found: dict[int, tuple[LogprobTensors, int]] = {}
        first = 0  # index of the row's first token among all of the step's
        for index, row in enumerate(rows):
            if row.prompt_logprobs:
                new = self._assigned[row.slot]
                count = min(row.num_tokens, new.num_prompt_tokens - 1 - row.start)
                if count > 0:
                    num_top = new.sampling.prompt_logprobs or 0
                    tensors = prompt_logprobs(
                        hidden[first : first + count],
                        compute_logits,
                        self._slots.token_ids[row.slot, row.start + 1 : row.start + 1 + count],
                        num_top,
                        vocab_size=self._sampling.vocab_size,
                    )
                    found[index] = tensors, num_top
            first += row.num_tokens
        return found
