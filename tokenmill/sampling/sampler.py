"""`Sampler`: one step's logits to tokens, on the device. The runner calls `sample`, and reads the tokens later.

Every row is worked out from its own logits, slot and position alone, in exact integer sums (`exact`), so a request
gets the same tokens whatever else is in the batch. Steps that no row needs are skipped; that is decided on the host
from plain integers, and nothing here waits for the device until `TokenReadback.wait`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tokenmill.ops.argmax import TokenPlaces, most_likely
from tokenmill.ops.sampling import SlotColumns, can_sample, sample_tokens
from tokenmill.sampling import steps
from tokenmill.sampling.exact import rows_per_slice, rows_where
from tokenmill.sampling.logprobs import token_logprobs
from tokenmill.sampling.random import draw, uniforms
from tokenmill.sampling.sampled_tokens import SampledTokens
from tokenmill.sampling.slot_params import BatchNeeds, Need, SlotSamplingParams


@dataclass(frozen=True, slots=True)
class _Rows:
    """A slice of the batch.

    Args:
        slots: [R] int64.
        positions: [R] int64.
        tokens: [S, L] int, every slot's tokens.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor

    def select(self, index: torch.Tensor) -> _Rows:
        """The rows at `index`."""
        return _Rows(self.slots[index], self.positions[index], self.tokens)


class Sampler:
    """Chooses the next token of each row. Keeps no state of its own: all of it is in `params`, by slot."""

    def __init__(self, params: SlotSamplingParams) -> None:
        self._params = params

    def sample(
        self,
        logits: torch.Tensor,  # [R, V] of any float type
        slots: torch.Tensor,  # [R] int64
        slot_list: Sequence[int],
        positions: torch.Tensor,  # [R] int
        token_buffer: torch.Tensor,  # [S, max_seq_len] int
        *,
        max_position: int | None = None,
    ) -> SampledTokens:
        """Choose the token at `positions` for each row. `logits` is left unchanged.

        Args:
            logits: the model's logits.
            slots: whose rows these are.
            slot_list: the same on the host.
            positions: index in its sequence of the token to choose: the number of tokens known, prompt and answer.
            token_buffer: known tokens by slot; read up to `positions`, where a row has penalties or bad words.
            max_position: largest of `positions` if the host knows it; bounds the work of penalties. None: max_seq_len.
        """
        assert logits.shape == (len(slot_list), self._params.vocab_size)
        if max_position is not None:
            token_buffer = token_buffer[:, : max(1, max_position)]
        greedy = self.most_likely(logits)
        token_ids, invalid, banned = greedy.token_ids, greedy.invalid, None
        needs = self._params.batch_needs(slot_list)
        if needs.flags and not needs.flags & Need.EDITS and can_sample(logits):
            token_ids = self._draw_in_one(logits, token_ids, slots, positions).masked_fill(invalid, 0)
        elif needs.flags:
            rows = _Rows(slots, positions.to(torch.int64), token_buffer)
            token_ids, banned = self._choose_in_slices(logits, invalid, rows, slot_list)
            invalid = invalid | banned
            token_ids = token_ids.masked_fill(invalid, 0)
        sampled = SampledTokens(token_ids, invalid, banned)
        return self._with_logprobs(logits, slots, slot_list, sampled)

    def most_likely(self, logits: torch.Tensor, places: TokenPlaces | None = None) -> SampledTokens:
        """The most likely token of each row of `logits` [R, V]; of equal ones the first. Fit for a CUDA graph.

        Args:
            logits: the model's logits.
            places: where the tokens are written as well.
        """
        return SampledTokens(*most_likely(logits, places))

    def _draw_in_one(
        self, logits: torch.Tensor, greedy: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:  # [R] int64
        """Temperature, top-k, top-p, min-p and the draw of all rows in one launch; greedy ones take `greedy`."""
        params = self._params
        columns = SlotColumns(
            temperature=params.float_column("temperature"),
            top_k=params.integer_column("top_k"),
            top_p=params.float_column("top_p"),
            min_p=params.float_column("min_p"),
            stream_key=params.integer_column("stream_key"),
        )
        return sample_tokens(logits, greedy, slots, positions.to(torch.int64), columns)

    def _choose_in_slices(
        self, logits: torch.Tensor, invalid: torch.Tensor, rows: _Rows, slot_list: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_choose` for a bounded number of rows at a time."""
        num_rows = rows_per_slice(logits)
        chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for start in range(0, logits.shape[0], num_rows):
            part = slice(start, start + num_rows)
            needs = self._params.batch_needs(slot_list[part])
            part_rows = _Rows(rows.slots[part], rows.positions[part], rows.tokens)
            chosen.append(self._choose(logits[part], invalid[part], part_rows, slot_list[part], needs))
        if len(chosen) == 1:
            return chosen[0]
        return torch.cat([part[0] for part in chosen]), torch.cat([part[1] for part in chosen])

    def _choose(
        self, logits: torch.Tensor, invalid: torch.Tensor, rows: _Rows, slot_list: Sequence[int], needs: BatchNeeds
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [R] int64, [R] bool: tokens, and where all tokens are banned
        # From here on no row holds NaN or +inf; what an invalid row gives is thrown away.
        logits = logits.float().masked_fill(invalid.unsqueeze(1), 0.0)
        logits = self._edit(logits, rows, slot_list, needs)
        row_max, token_ids = logits.max(dim=-1)
        banned = row_max.isneginf() & ~invalid
        if needs.num_random == logits.shape[0]:
            token_ids = self._draw(logits, rows, needs)
        elif needs.num_random:
            index = rows_where(self._params.floats("temperature", rows.slots) > 0.0, needs.num_random)
            token_ids = token_ids.index_copy(0, index, self._draw(logits[index], rows.select(index), needs))
        return token_ids, banned

    def _edit(
        self, logits: torch.Tensor, rows: _Rows, slot_list: Sequence[int], needs: BatchNeeds
    ) -> torch.Tensor:  # [R, V] float32
        """Penalties, logit bias, bad words and bans."""
        if needs.flags & Need.PENALTIES:
            logits = self._penalize(logits, rows, needs)
        if needs.flags & Need.BIAS:
            width = max(map(self._params.biases.length, slot_list))
            (ids, values), _ = self._params.biases.gather(rows.slots, width)
            logits = steps.add_bias(logits, ids, values)
        if needs.flags & Need.BAD_WORDS:
            logits = self._ban_bad_words(logits, rows, slot_list)
        if needs.flags & Need.MIN_TOKENS:
            width = max(map(self._params.bans.length, slot_list))
            (ids,), used = self._params.bans.gather(rows.slots, width)
            num_answered = rows.positions - self._params.integers("num_prompt_tokens", rows.slots)
            too_early = num_answered < self._params.integers("min_tokens", rows.slots)
            logits = steps.ban(logits, ids, used & too_early.unsqueeze(1))
        return logits

    def _penalize(self, logits: torch.Tensor, rows: _Rows, needs: BatchNeeds) -> torch.Tensor:
        params = self._params
        if needs.num_penalized < logits.shape[0]:
            repetition = params.floats("repetition_penalty", rows.slots) != 1.0
            presence = params.floats("presence_penalty", rows.slots) != 0.0
            frequency = params.floats("frequency_penalty", rows.slots) != 0.0
            index = rows_where(repetition | presence | frequency, needs.num_penalized)
            penalized = self._penalize_all(logits[index], rows.select(index), needs)
            return logits.index_copy(0, index, penalized)
        return self._penalize_all(logits, rows, needs)

    def _penalize_all(self, logits: torch.Tensor, rows: _Rows, needs: BatchNeeds) -> torch.Tensor:
        params, slots = self._params, rows.slots
        tokens = rows.tokens[slots]  # [R, L]
        if needs.flags & Need.REPETITION:
            counts = steps.count_tokens(tokens, 0, rows.positions, params.vocab_size)
            penalty = params.floats("repetition_penalty", slots).to(torch.float32)
            logits = steps.repetition_penalty(logits, counts, penalty)
        if needs.flags & Need.COUNTS:
            first = params.integers("num_prompt_tokens", slots)
            counts = steps.count_tokens(tokens, first, rows.positions, params.vocab_size)
            presence = params.floats("presence_penalty", slots).to(torch.float32)
            frequency = params.floats("frequency_penalty", slots).to(torch.float32)
            logits = steps.count_penalties(logits, counts, presence, frequency)
        return logits

    def _ban_bad_words(self, logits: torch.Tensor, rows: _Rows, slot_list: Sequence[int]) -> torch.Tensor:
        params = self._params
        num_words = max(map(params.bad_words.length, slot_list))
        (last,), used = params.bad_words.gather(rows.slots, num_words)
        num_starts = max(map(params.bad_word_starts.length, slot_list))
        if num_starts:
            (word, distance, expected), start_used = params.bad_word_starts.gather(rows.slots, num_starts)
            used = used & steps.matching_words(
                rows.tokens, rows.slots, rows.positions, word, distance, expected, start_used, num_words
            )
        return steps.ban(logits, last, used)

    def _draw(self, logits: torch.Tensor, rows: _Rows, needs: BatchNeeds) -> torch.Tensor:  # [R] int64
        """Temperature, top-k, top-p, min-p and the draw, for rows that are not greedy."""
        params, slots = self._params, rows.slots
        logits = steps.temperature(logits, params.floats("temperature", slots).to(torch.float32))
        if needs.flags & Need.TOP_K:
            logits = steps.top_k(logits, params.integers("top_k", slots), needs.max_top_k)
        if needs.flags & Need.TOP_P:
            logits = steps.top_p(logits, params.floats("top_p", slots))
        if needs.flags & Need.MIN_P:
            logits = steps.min_p(logits, params.floats("min_p", slots))
        return draw(logits, uniforms(params.integers("stream_key", slots), rows.positions))

    def _with_logprobs(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        slot_list: Sequence[int],
        sampled: SampledTokens,
    ) -> SampledTokens:
        wanted = [
            (row, needs.num_logprobs)
            for row, needs in enumerate(map(self._params.slot_needs, slot_list))
            if needs.num_logprobs is not None
        ]
        if not wanted:
            return sampled
        rows, counts = zip(*wanted, strict=True)
        chosen = sampled.token_ids
        if len(rows) < logits.shape[0]:
            index = rows_where(self._params.integers("num_logprobs", slots) >= 0, len(rows))
            logits, chosen = logits[index], chosen[index]
        logprobs = token_logprobs(logits, chosen, max(counts))
        return replace(sampled, logprobs=logprobs, logprob_rows=rows, num_logprobs=counts)
