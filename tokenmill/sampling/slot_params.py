"""`SlotSamplingParams`: the sampling parameters of every slot, on the device, and on the host what they call for.

The runner assigns slots when a plan brings new ones; `sampler` reads the device tensors by slot, and decides from the
host's plain integers which steps nobody in the batch needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag, auto

import numpy as np
import torch

from tokenmill.engine.plan import NewSlot
from tokenmill.ops.upload import upload
from tokenmill.sampling.random import stream_key
from tokenmill.sampling.slot_lists import SlotLists
from tokenmill.sampling_params import SamplingParams

_MIN_TEMPERATURE = 1e-30
"""Float32 still divides by it; at this temperature only ties with the most likely token have a chance."""
_MIN_REPETITION_PENALTY = 1e-30
"""Likewise: a penalty that rounds to zero would make NaN of a logit of -inf."""
_MAX_BIAS = 1e30
"""Beyond any logit, and too small to carry one over to infinity."""


class Need(IntFlag):
    """Steps that a slot calls for."""

    RANDOM = auto()
    TOP_K = auto()
    TOP_P = auto()
    MIN_P = auto()
    REPETITION = auto()
    COUNTS = auto()
    BIAS = auto()
    BAD_WORDS = auto()
    MIN_TOKENS = auto()

    EDITS = REPETITION | COUNTS | BIAS | BAD_WORDS | MIN_TOKENS
    PENALTIES = REPETITION | COUNTS


@dataclass(frozen=True, slots=True)
class SlotNeeds:
    """What one slot calls for, on the host.

    Args:
        flags: the steps, a `Need`.
        top_k: its k; 0 if off.
        num_logprobs: most likely tokens to return with the chosen one; None: no log-probabilities.
    """

    flags: int = 0
    top_k: int = 0
    num_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class BatchNeeds:
    """What the rows of a batch call for together.

    Args:
        flags: the steps that any row needs.
        num_random: rows that draw.
        num_penalized: rows with a penalty.
        max_top_k: largest k of any row.
    """

    flags: Need
    num_random: int
    num_penalized: int
    max_top_k: int


class SlotSamplingParams:
    """Sampling parameters by slot. S slots, V tokens in the vocabulary.

    Args:
        max_slots: S.
        vocab_size: V. Token ids from V on, which no model can produce, are left out of bans, biases and bad words.
        device: where the sampler runs.

    Attributes:
        biases: logit biases: (token id, value).
        bans: tokens that must wait for `min_tokens`: (token id).
        bad_words: (last token id) of each bad word.
        bad_word_starts: tokens before the last: (index of the word in `bad_words`, distance from the last, token id).
    """

    def __init__(self, max_slots: int, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._integers = torch.zeros(max_slots, len(_INTEGERS), dtype=torch.int64, device=self.device)
        self._floats = torch.zeros(max_slots, len(_FLOATS), dtype=torch.float64, device=self.device)
        self._needs = [SlotNeeds()] * max_slots
        self.biases = SlotLists(max_slots, (np.int64, np.float32), self.device)
        self.bans = SlotLists(max_slots, (np.int64,), self.device)
        self.bad_words = SlotLists(max_slots, (np.int64,), self.device)
        self.bad_word_starts = SlotLists(max_slots, (np.int64, np.int64, np.int64), self.device)

    def assign(self, new_slots: Sequence[NewSlot]) -> None:
        """Give slots to new sequences; nothing of what they held before remains. A few copies for all of them."""
        if not new_slots:
            return
        for new in new_slots:
            self._set_lists(new)
            self._needs[new.slot] = self._slot_needs(new)
        for lists in (self.biases, self.bans, self.bad_words, self.bad_word_starts):
            lists.upload_changes()
        integers = np.array([(new.slot, *(read(new) for read in _INTEGERS.values())) for new in new_slots], np.int64)
        floats = np.array([[read(new.sampling) for read in _FLOATS.values()] for new in new_slots], np.float64)
        uploaded = upload(integers, self.device)
        self._integers.index_copy_(0, uploaded[:, 0], uploaded[:, 1:])
        self._floats.index_copy_(0, uploaded[:, 0], upload(floats, self.device))

    def integers(self, name: str, slots: torch.Tensor) -> torch.Tensor:
        """[R] int64: `stream_key`, `num_prompt_tokens`, `min_tokens`, `top_k` or `num_logprobs` (-1: none)
        of `slots` [R]."""
        return self._integers[:, _INTEGER_INDEX[name]][slots]

    def floats(self, name: str, slots: torch.Tensor) -> torch.Tensor:
        """[R] float64: `temperature` (0: greedy), `top_p`, `min_p` or a penalty of `slots` [R]."""
        return self._floats[:, _FLOAT_INDEX[name]][slots]

    def integer_column(self, name: str) -> torch.Tensor:
        """[S] int64 of all slots, see `integers`; a column of a table."""
        return self._integers[:, _INTEGER_INDEX[name]]

    def float_column(self, name: str) -> torch.Tensor:
        """[S] float64 of all slots, see `floats`; a column of a table."""
        return self._floats[:, _FLOAT_INDEX[name]]

    def slot_needs(self, slot: int) -> SlotNeeds:
        """What `slot` calls for."""
        return self._needs[slot]

    def is_plain_greedy(self, slot_list: Sequence[int]) -> bool:
        """Whether every slot takes the most likely token and wants nothing else: no edits, no log-probabilities."""
        needs = self._needs
        return all(needs[slot].flags == 0 and needs[slot].num_logprobs is None for slot in slot_list)

    def batch_needs(self, slot_list: Sequence[int]) -> BatchNeeds:
        """What the slots of a batch call for together; host integers only."""
        flags = num_random = num_penalized = max_top_k = 0
        random, penalties = int(Need.RANDOM), int(Need.PENALTIES)
        for slot in slot_list:
            needs = self._needs[slot]
            flags |= needs.flags
            num_random += bool(needs.flags & random)
            num_penalized += bool(needs.flags & penalties)
            max_top_k = max(max_top_k, needs.top_k)
        return BatchNeeds(Need(flags), num_random, num_penalized, max_top_k)

    def _set_lists(self, new: NewSlot) -> None:
        sampling = new.sampling
        bias = {token: value for token, value in (sampling.logit_bias or {}).items() if 0 <= token < self.vocab_size}
        values = np.clip(np.fromiter(bias.values(), np.float64, len(bias)), -_MAX_BIAS, _MAX_BIAS)
        self.biases.set(new.slot, (np.fromiter(bias, np.int64, len(bias)), values))

        ends = (*new.end_ids, *(sampling.stop_token_ids or ())) if sampling.min_tokens else ()
        bans = [token for token in dict.fromkeys(ends) if 0 <= token < self.vocab_size]
        self.bans.set(new.slot, (np.array(bans, np.int64),))

        words = [*new.bad_words, *((token,) for token in sampling.bad_token_ids or ())]
        words = [word for word in dict.fromkeys(words) if word and 0 <= word[-1] < self.vocab_size]
        self.bad_words.set(new.slot, (np.array([word[-1] for word in words], np.int64),))
        starts = [
            (index, distance, word[-1 - distance])
            for index, word in enumerate(words)
            for distance in range(1, len(word))
        ]
        self.bad_word_starts.set(new.slot, tuple(np.array(starts, np.int64).reshape(-1, 3).T))

    def _slot_needs(self, new: NewSlot) -> SlotNeeds:
        sampling = new.sampling
        floats = {name: read(sampling) for name, read in _FLOATS.items()}
        top_k = sampling.top_k or 0
        flags = Need(0)
        if not sampling.greedy:
            flags |= Need.RANDOM
            flags |= Need.TOP_K if 0 < top_k < self.vocab_size else Need(0)
            flags |= Need.TOP_P if floats["top_p"] < 1.0 else Need(0)
            flags |= Need.MIN_P if floats["min_p"] > 0.0 else Need(0)
        flags |= Need.REPETITION if floats["repetition_penalty"] != 1.0 else Need(0)
        counts = floats["presence_penalty"] != 0.0 or floats["frequency_penalty"] != 0.0
        flags |= Need.COUNTS if counts else Need(0)
        flags |= Need.BIAS if self.biases.length(new.slot) else Need(0)
        flags |= Need.BAD_WORDS if self.bad_words.length(new.slot) else Need(0)
        flags |= Need.MIN_TOKENS if self.bans.length(new.slot) else Need(0)
        num_logprobs = _num_logprobs(sampling)
        return SlotNeeds(int(flags), top_k if Need.TOP_K in flags else 0, None if num_logprobs < 0 else num_logprobs)


def _temperature(sampling: SamplingParams) -> float:
    if sampling.greedy:
        return 0.0
    return 1.0 if sampling.temperature is None else max(sampling.temperature, _MIN_TEMPERATURE)


def _num_logprobs(sampling: SamplingParams) -> int:
    """Most likely tokens to return with the chosen one; -1: no log-probabilities at all."""
    if sampling.logprobs is not None:
        return sampling.logprobs
    return 0 if sampling.num_sequences > sampling.n else -1  # the best of several needs the chosen tokens'


def _or_default(value: float | None, default: float) -> float:
    return default if value is None else value


_INTEGERS: dict[str, Callable[[NewSlot], int]] = {
    "stream_key": lambda new: stream_key(new.seed, new.sequence_index),
    "num_prompt_tokens": lambda new: new.num_prompt_tokens,
    "min_tokens": lambda new: new.sampling.min_tokens or 0,
    "top_k": lambda new: min(new.sampling.top_k or 0, 2**62),
    "num_logprobs": lambda new: _num_logprobs(new.sampling),
}
_FLOATS: dict[str, Callable[[SamplingParams], float]] = {
    "temperature": _temperature,
    "top_p": lambda sampling: _or_default(sampling.top_p, 1.0),
    "min_p": lambda sampling: _or_default(sampling.min_p, 0.0),
    "repetition_penalty": lambda sampling: max(_or_default(sampling.repetition_penalty, 1.0), _MIN_REPETITION_PENALTY),
    "presence_penalty": lambda sampling: _or_default(sampling.presence_penalty, 0.0),
    "frequency_penalty": lambda sampling: _or_default(sampling.frequency_penalty, 0.0),
}
_INTEGER_INDEX = {name: index for index, name in enumerate(_INTEGERS)}
_FLOAT_INDEX = {name: index for index, name in enumerate(_FLOATS)}
