"""What crosses the `Runner` seam: a frozen `BatchPlan` down, a frozen `StepOutput` up. Ids, counts and blocks only.

The runner keeps all state of a sequence by *slot* (tokens, block table, sampling parameters). A plan says what changed
(`new_slots`, `new_blocks`, `block_copies`), then which slots compute which positions (`rows`). The order of application
is: block copies, new slots, new blocks, rows. Plans are applied in the order of launch, each as if the one before it
had ended: a plan may overwrite a slot or a block that the plan before it still uses.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from tokenmill.errors import TokenmillError
from tokenmill.outputs import TokenLogprobs
from tokenmill.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewSlot:
    """A sequence takes a slot; whatever the slot held before is overwritten.

    Args:
        slot: 0 <= slot < max_batch_size.
        token_ids: all known tokens: the prompt, and after a preemption the answer so far.
        num_prompt_tokens: how many of them are the prompt.
        block_ids: its block table so far, with room for all of `token_ids`.
        sampling: how its tokens are chosen.
        seed: seed of the request, 64 bits.
        sequence_index: which of the request's sequences; with `seed` and the position it fixes the random draw.
        end_ids: tokens that end the sequence, the model's and the caller's (banned until `sampling.min_tokens`).
        bad_words: token sequences that must not be generated.
    """

    slot: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    block_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    sequence_index: int
    end_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class NewBlocks:
    """Append `block_ids` to the block table of `slot`, from index `start`."""

    slot: int
    start: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy a cache block, all layers (copy-on-write)."""

    source: int
    destination: int


@dataclass(slots=True)  # not frozen: every row of every step makes one, in a third of the time
class Row:
    """Compute positions `start` to `start + num_tokens - 1` of the sequence in `slot`.

    Input tokens are read from the slot's token buffer. With `sample`, the last position's logits give the token at
    position `start + num_tokens`, which the runner also writes to the slot's token buffer. With `prompt_logprobs`,
    log-probabilities of the tokens at positions `start + 1` to `start + num_tokens` are returned, as far as they are
    prompt tokens.
    """

    slot: int
    start: int
    num_tokens: int
    sample: bool
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One step's work. `rows` holds each slot at most once, rows of one token first; each new slot has a row.

    No block is written by two rows, or by a row and read by another, or both copied to and copied from.

    With `max_repeats` more than 1, all rows have one token and sample, and the runner may compute them up to so many
    times without asking: each time a row's position is the next one, and its input the token that it has just sampled.
    The block tables have room for that. With `is_watched` somebody reads the tokens as they come, or their text may end
    the answer: they should be told within the time of a picture on a screen.
    """

    step: int
    rows: tuple[Row, ...]
    new_slots: tuple[NewSlot, ...] = ()
    new_blocks: tuple[NewBlocks, ...] = ()
    block_copies: tuple[BlockCopy, ...] = ()
    max_repeats: int = 1
    is_watched: bool = True

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step, if it is not repeated."""
        return sum(row.num_tokens for row in self.rows)


@dataclass(slots=True)  # not frozen: every row of every step makes one, in a third of the time
class RowOutput:
    """What one row of the plan gave.

    Args:
        token_id: the sampled token; None exactly when the row did not sample, or failed.
        logprobs: of the sampled token and the most likely ones, if asked for (the sampled one always if best_of > n).
        prompt_logprobs: one entry for each prompt token that the row covers, if asked for.
        error: set when no token could be chosen: the row's logits are not finite, or the request bans every token.
        more_token_ids: the tokens after `token_id`, if the runner repeated the step; as many for each row.
    """

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: TokenmillError | None = None
    more_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gave: `rows[i]` answers `plan.rows[i]`."""

    rows: tuple[RowOutput, ...]


StepT = TypeVar("StepT")
"""A launched step, opaque to the engine; only the runner that made it can read it."""


class Runner(Protocol[StepT]):
    """What the engine needs from a runtime.

    `run(plan)` is `collect(launch(plan))`. Steps are collected in the order of launch; a step may be launched before
    the one before it is collected, since sampled tokens stay in the slots.
    """

    def launch(self, plan: BatchPlan) -> StepT:
        """Start the step."""
        ...

    def collect(self, pending: StepT) -> StepOutput:
        """Wait for the step and read what it gave."""
        ...

    def run(self, plan: BatchPlan) -> StepOutput:
        """Launch and collect."""
        ...


class Interruption:
    """A word in memory that tells a runner that somebody waits for the engine.

    Set by those who put something into the engine's inbox, cleared by the engine's thread before it looks there.

    Any thread may set and read it; native code reads it at `address` between two steps.

    Attributes:
        address: of the int64, which is not 0 while it is set.
    """

    def __init__(self) -> None:
        self._word = ctypes.c_int64(0)
        self.address = ctypes.addressof(self._word)

    def set(self) -> None:
        """Somebody waits."""
        self._word.value = 1

    def clear(self) -> None:
        """Those who waited are heard."""
        self._word.value = 0

    @property
    def is_set(self) -> bool:
        """Whether somebody waits."""
        return self._word.value != 0


@runtime_checkable
class RepeatingRunner(Protocol):
    """A runner that repeats steps, see `BatchPlan.max_repeats`."""

    @property
    def max_repeats(self) -> int:
        """The most that are of use to it."""
        ...

    def interrupt_when(self, interruption: Interruption) -> None:
        """Repeat no more while it is set: somebody waits for the engine."""
        ...
