"""`StepArrays`: one step as an executor of programs reads it: plain integers in arrays that are allocated once.

A runner writes them from the slots with a few numpy operations, whatever the number of tokens; a user of `Session`
writes them from named inputs. The executors' native code keeps their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from tokenmill.engine.plan import Row

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]
SlotIntegers: TypeAlias = np.ndarray[Any, np.dtype[Any]]

MAX_STEPS: Final = 64
"""Most steps that an executor does in one call."""

NUM_END_IDS: Final = 4
"""Tokens that end a sequence, as far as executors know of them: others are noticed some steps later."""

NO_TOKEN: Final = -1

FEW_ROWS: Final = 2


class StepArrays:
    """T tokens of S sequences, concatenated, of which R tokens' logits are wanted. Sequences of one token come first.

    Args:
        max_num_tokens: largest T.
        max_batch_size: largest S.
        max_num_rows: largest R.
        max_seq_len: longest sequence, in tokens.
        tokens_per_block: tokens in one cache block.

    Attributes:
        token_ids, positions: [T].
        query_start: [S + 1], sequence s has the tokens query_start[s] to query_start[s + 1] - 1.
        kv_lens: [S], cached tokens of each sequence, this step's included.
        block_tables: [S, blocks of the longest sequence].
        row_index: [R], indices of tokens.
        end_ids: [S, NUM_END_IDS], tokens after which a sequence needs no step; `NO_TOKEN` where there are fewer.
        num_tokens, num_sequences, num_rows: T, S and R.
        num_decode: sequences of one token, at the front.
    """

    def __init__(
        self, *, max_num_tokens: int, max_batch_size: int, max_num_rows: int, max_seq_len: int, tokens_per_block: int
    ) -> None:
        self.tokens_per_block = tokens_per_block
        self.max_num_tokens = max_num_tokens
        self.max_batch_size = max_batch_size
        self.max_num_rows = max_num_rows
        self.token_ids: Integers = np.zeros(max_num_tokens, np.int32)
        self.positions: Integers = np.zeros(max_num_tokens, np.int32)
        self.query_start: Integers = np.zeros(max_batch_size + 1, np.int32)
        self.kv_lens: Integers = np.zeros(max_batch_size, np.int32)
        self.block_tables: Integers = np.zeros((max_batch_size, -(-max_seq_len // tokens_per_block)), np.int32)
        self.row_index: Integers = np.zeros(max_num_rows, np.int32)
        self.end_ids: Integers = np.full((max_num_rows, NUM_END_IDS), NO_TOKEN, np.int32)
        self.num_tokens = self.num_sequences = self.num_rows = self.num_decode = 0

    def fill(
        self,
        rows: Sequence[Row],
        token_ids: SlotIntegers,
        block_tables: SlotIntegers,
        end_ids: SlotIntegers | None = None,
        *,
        max_repeats: int = 1,
    ) -> None:
        """Write the step of a plan's rows; the logits of the last token of each row that samples are wanted.

        Args:
            rows: those of one token first.
            token_ids: [slots, positions], known tokens.
            block_tables: [slots, blocks].
            end_ids: [slots, NUM_END_IDS], wanted if the step is repeated.
            max_repeats: `advance` will be called less often than this.
        """
        if len(rows) <= FEW_ROWS and all(row.num_tokens == 1 and row.sample for row in rows):
            self._fill_few(rows, token_ids, block_tables, end_ids, max_repeats)
            return
        num_sequences = len(rows)
        slots, starts, lens = np.array([(row.slot, row.start, row.num_tokens) for row in rows]).T
        kv_lens = starts + lens
        ends = lens.cumsum()
        num_tokens = int(ends[-1])
        if num_tokens == num_sequences:
            positions, token_slots = starts, slots
        else:
            token_slots = slots.repeat(lens)
            positions = np.arange(num_tokens) + (kv_lens - ends).repeat(lens)
        self.num_tokens, self.num_sequences = num_tokens, num_sequences
        self.num_decode = next((index for index, row in enumerate(rows) if row.num_tokens > 1), num_sequences)
        self.token_ids[:num_tokens] = token_ids[token_slots, positions]
        self.positions[:num_tokens] = positions
        self.query_start[1 : num_sequences + 1] = ends
        self.kv_lens[:num_sequences] = kv_lens
        num_blocks = -(-(int(kv_lens.max()) + max_repeats - 1) // self.tokens_per_block)
        self.block_tables[:num_sequences, :num_blocks] = block_tables[slots, :num_blocks]
        if max_repeats > 1 and end_ids is not None:
            self.end_ids[:num_sequences] = end_ids[slots]
        sampled = [index for index, row in enumerate(rows) if row.sample]
        self.num_rows = len(sampled)
        self.row_index[: self.num_rows] = ends[sampled] - 1

    def _fill_few(
        self,
        rows: Sequence[Row],
        token_ids: SlotIntegers,
        block_tables: SlotIntegers,
        end_ids: SlotIntegers | None,
        max_repeats: int,
    ) -> None:
        """The same for few rows of one token, with less code: between two steps none of it is in a cache."""
        num_blocks = -(-(max(row.start for row in rows) + max_repeats) // self.tokens_per_block)
        for index, row in enumerate(rows):
            slot, start = row.slot, row.start
            self.token_ids[index] = token_ids[slot, start]
            self.positions[index] = start
            self.kv_lens[index] = start + 1
            self.query_start[index + 1] = index + 1
            self.row_index[index] = index
            self.block_tables[index, :num_blocks] = block_tables[slot, :num_blocks]
            if max_repeats > 1 and end_ids is not None:
                self.end_ids[index] = end_ids[slot]
        self.num_tokens = self.num_sequences = self.num_rows = self.num_decode = len(rows)

    def advance(self, token_ids: Integers) -> None:
        """From a step of one token for each sequence to the next one.

        Args:
            token_ids: [S], what the step gave, its sequences' next input.
        """
        count = self.num_sequences
        self.token_ids[:count] = token_ids
        self.positions[:count] += 1
        self.kv_lens[:count] += 1

    def slot_mapping(self) -> Integers:
        """[T], where each token's key and value go: block * tokens_per_block + offset."""
        lens = np.diff(self.query_start[: self.num_sequences + 1])
        kv_lens, ends = self.kv_lens[: self.num_sequences], self.query_start[1 : self.num_sequences + 1]
        positions = np.arange(self.num_tokens) + (kv_lens - ends).repeat(lens)
        block, offset = np.divmod(positions, self.tokens_per_block)
        slots: Integers = self.block_tables[np.arange(len(lens)).repeat(lens), block] * self.tokens_per_block + offset
        return slots
