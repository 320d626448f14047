"""`TokenizingPool`: where prompts become tokens, without a long one filling the memory or holding up the others.

A tokenizer takes some 300 bytes for each character of a text, so a body of 16 MiB would take 5 GiB. A text that cannot
fit the model is therefore refused before it is tokenized, and few are tokenized at the same time. For the endpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

import anyio

from tokenmill.errors import PromptTooLongError

if TYPE_CHECKING:
    from tokenmill.llm import LLM

_NUM_THREADS: Final = 4
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class TokenizingPool:
    """Threads for work that tokenizes.

    Args:
        llm: for its tokenizer and its longest sequence.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._limiter = anyio.CapacityLimiter(_NUM_THREADS)

    async def run(
        self, function: Callable[_Parameters, _Result], *args: _Parameters.args, **kwargs: _Parameters.kwargs
    ) -> _Result:
        """Call `function` on a thread."""
        return await anyio.to_thread.run_sync(partial(function, *args, **kwargs), limiter=self._limiter)

    def check_length(self, num_characters: int, field: str) -> None:
        """Refuse a text that has more tokens than a sequence may have, however long each of them is.

        Raises:
            PromptTooLongError: it has; `field` is the parameter that holds it.
        """
        if num_characters <= self._llm.max_seq_len or self._llm.tokenizer is None:
            return
        if num_characters > self._max_characters:
            raise PromptTooLongError(
                f"The prompt has {num_characters} characters; {self._llm.max_seq_len} tokens, the most that prompt and "
                f"answer together may have, are at most {self._max_characters}.",
                field=field,
                remedy="Shorten it.",
            )

    @cached_property
    def _max_characters(self) -> int:
        tokenizer = self._llm.tokenizer
        assert tokenizer is not None
        longest = max(len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size))
        return self._llm.max_seq_len * max(1, longest)
