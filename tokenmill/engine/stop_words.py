"""`StopWords`: finds token sequences in an answer as it grows. The ledger keeps one for each request that has some.

A trie of the words with a fallback from each state to the longest of its suffixes that is a state too, so that a token
costs the same however many words there are. Source: Aho and Corasick, "Efficient string matching", 1975.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

MAX_STOP_WORD_TOKENS = 4096
"""Tokens that all stop words of a request may have together."""


class StopWords:
    """A state is a number; 0 is the start. Immutable after construction, so the sequences of a request share it.

    Args:
        words: token sequences, none of them empty.
    """

    def __init__(self, words: Iterable[tuple[int, ...]]) -> None:
        self._children: list[dict[int, int]] = [{}]
        self._fallbacks = [0]
        self._depths = [0]
        self._word_lengths = [0]
        for word in words:
            self._insert(word)
        self._connect()

    def advance(self, state: int, token_id: int) -> int:
        """The state after one more token."""
        while state and token_id not in self._children[state]:
            state = self._fallbacks[state]
        return self._children[state].get(token_id, 0)

    def num_open_tokens(self, state: int) -> int:
        """How many of the last tokens may be the beginning of a word (or are one)."""
        return self._depths[state]

    def num_matched_tokens(self, state: int) -> int:
        """Length of the longest word that ends with the last token; 0 if none does."""
        return self._word_lengths[state]

    def _insert(self, word: tuple[int, ...]) -> None:
        assert word, "an empty stop word"
        state = 0
        for depth, token_id in enumerate(word, start=1):
            if token_id not in self._children[state]:
                self._children[state][token_id] = len(self._children)
                self._children.append({})
                self._fallbacks.append(0)
                self._depths.append(depth)
                self._word_lengths.append(0)
            state = self._children[state][token_id]
        self._word_lengths[state] = len(word)

    def _connect(self) -> None:
        """Fallbacks, shortest states first: that of a child continues the one of its parent."""
        pending = deque(self._children[0].values())
        while pending:
            state = pending.popleft()
            fallback = self._fallbacks[state]
            self._word_lengths[state] = self._word_lengths[state] or self._word_lengths[fallback]
            for token_id, child in self._children[state].items():
                self._fallbacks[child] = self.advance(fallback, token_id)
                pending.append(child)
