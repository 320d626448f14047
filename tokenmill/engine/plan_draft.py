"""`PlanDraft`: a `BatchPlan` while the scheduler writes it."""

from __future__ import annotations

from tokenmill.engine.plan import BatchPlan, BlockCopy, NewBlocks, NewSlot, Row
from tokenmill.engine.sequence import Sequence
from tokenmill.kv_cache.manager import PrefixGrant


class PlanDraft:
    """Rows and slot changes collected so far, under the budget of tokens.

    Args:
        step: number of the plan.
        max_num_tokens: most tokens in the plan.

    Attributes:
        num_tokens_left: what the rows leave of the budget.
        max_repeats, is_watched: see `BatchPlan`.
    """

    def __init__(self, step: int, max_num_tokens: int) -> None:
        self.step = step
        self.num_tokens_left = max_num_tokens
        self.max_repeats = 1
        self.is_watched = True
        self._one_token_rows: list[Row] = []
        self._one_token_sequences: list[Sequence] = []
        self._longer_rows: list[Row] = []
        self._longer_sequences: list[Sequence] = []
        self._new_slots: list[NewSlot] = []
        self._new_blocks: list[NewBlocks] = []
        self._block_copies: list[BlockCopy] = []

    @property
    def sequences(self) -> list[Sequence]:
        """Whose rows the plan has, in the order of the rows."""
        return self._one_token_sequences + self._longer_sequences

    @property
    def is_decoding(self) -> bool:
        """Whether there are rows, and all are of one token, sample, and give nothing but the sampled token."""
        rows = self._one_token_rows
        return bool(rows) and not self._longer_rows and all(row.sample and not row.prompt_logprobs for row in rows)

    def scheduled_slots(self) -> set[int]:
        """Slots that have a row."""
        return {row.slot for row in self._one_token_rows + self._longer_rows}

    def add_row(self, sequence: Sequence, num_tokens: int) -> None:
        """Let the plan compute the sequence's next `num_tokens` tokens, and sample one after the last known token."""
        start = sequence.num_scheduled_tokens
        end = start + num_tokens
        sample = end == sequence.length
        row = Row(sequence.slot, start, num_tokens, sample, _gives_prompt_logprobs(sequence, start, end))
        if num_tokens == 1:
            self._one_token_rows.append(row)
            self._one_token_sequences.append(sequence)
        else:
            self._longer_rows.append(row)
            self._longer_sequences.append(sequence)
        sequence.num_scheduled_tokens = end
        if sample:
            sequence.length += 1
        self.num_tokens_left -= num_tokens

    def add_slot(self, sequence: Sequence, grant: PrefixGrant) -> None:
        """Let the sequence take its slot, with the blocks of `grant`."""
        inputs = sequence.request.inputs
        self._new_slots.append(
            NewSlot(
                slot=sequence.slot,
                token_ids=tuple(sequence.token_ids),
                num_prompt_tokens=sequence.request.num_prompt_tokens,
                block_ids=grant.block_ids,
                sampling=inputs.sampling,
                seed=inputs.seed,
                sequence_index=sequence.index,
                end_ids=inputs.end_ids + inputs.stop_token_ids,
                bad_words=inputs.bad_words,
            )
        )
        if grant.copy is not None:
            self._block_copies.append(BlockCopy(*grant.copy))

    def add_blocks(self, sequence: Sequence, start: int, block_ids: tuple[int, ...]) -> None:
        """Append blocks to the block table of the sequence's slot, from index `start`."""
        self._new_blocks.append(NewBlocks(sequence.slot, start, block_ids))

    def build(self) -> BatchPlan:
        """The plan."""
        return BatchPlan(
            step=self.step,
            rows=tuple(self._one_token_rows + self._longer_rows),
            new_slots=tuple(self._new_slots),
            new_blocks=tuple(self._new_blocks),
            block_copies=tuple(self._block_copies),
            max_repeats=self.max_repeats,
            is_watched=self.is_watched,
        )


def _gives_prompt_logprobs(sequence: Sequence, start: int, end: int) -> bool:
    """Whether positions `start` to `end - 1` give log-probabilities of prompt tokens that were not delivered yet."""
    request = sequence.request
    return (
        request.wants_prompt_logprobs
        and sequence.index == 0
        and start < request.num_prompt_tokens - 1
        and end > sequence.num_prompt_logprobs
    )
