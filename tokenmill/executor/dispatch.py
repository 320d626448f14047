"""Which replica runs a request: plain functions of plain data. Called by `RequestFlow`.

A replica's cost for a request is counted in tokens: what it has to do before and beside it, what of the prompt it has
not cached, and what does not fit its cache. So a replica that has the beginning of a prompt wins, unless another is
less busy by more than that saves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

MAX_PREFIX_BLOCKS: Final = 256
"""Blocks of a prompt that are looked at."""


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """A replica that could take the request now.

    Args:
        index: its number.
        num_queued_tokens: tokens that it has still to compute for requests that it has, as far as can be told.
        num_free_blocks: cache blocks that are neither used nor promised; may be negative.
        num_cached_tokens: tokens of the request's prompt that it probably has in its cache.
        last_used: when it got its last request; any rising number.
    """

    index: int
    num_queued_tokens: int
    num_free_blocks: int
    num_cached_tokens: int
    last_used: int


def choose_replica(
    loads: Iterable[ReplicaLoad], *, num_prompt_tokens: int, num_blocks: int, tokens_per_block: int
) -> int:
    """The replica of the lowest cost; of equals the one that was not used for longest.

    Args:
        loads: at least one.
        num_prompt_tokens: of the request.
        num_blocks: cache blocks that the request may need.
        tokens_per_block: tokens in a block.
    """

    def cost(load: ReplicaLoad) -> tuple[int, int]:
        num_missing_blocks = max(0, num_blocks - load.num_free_blocks)
        num_uncached_tokens = num_prompt_tokens - load.num_cached_tokens
        return load.num_queued_tokens + num_uncached_tokens + num_missing_blocks * tokens_per_block, load.last_used

    return min(loads, key=cost).index


def prefix_keys(token_ids: Sequence[int], tokens_per_block: int) -> tuple[int, ...]:
    """One number for each full block of a prompt, which stands for all tokens up to its end."""
    keys: list[int] = []
    key = 0
    num_blocks = min(len(token_ids) // tokens_per_block, MAX_PREFIX_BLOCKS)
    for start in range(0, num_blocks * tokens_per_block, tokens_per_block):
        key = hash((key, tuple(token_ids[start : start + tokens_per_block])))
        keys.append(key)
    return tuple(keys)


class PrefixIndex:
    """What one replica probably has in its cache: keys of prompts that it got, the latest ones.

    Args:
        max_blocks: how many are remembered; the size of the replica's cache.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._keys: OrderedDict[int, None] = OrderedDict()

    def num_matching(self, keys: Sequence[int]) -> int:
        """How many of a prompt's first blocks are known."""
        for count, key in enumerate(keys):
            if key not in self._keys:
                return count
        return len(keys)

    def add(self, keys: Sequence[int]) -> None:
        """The replica gets a prompt."""
        for key in reversed(keys):  # the first block is the last to be forgotten
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._max_blocks:
            self._keys.popitem(last=False)

    def clear(self) -> None:
        """The replica lost its cache."""
        self._keys.clear()
