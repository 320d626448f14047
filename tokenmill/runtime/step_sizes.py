"""Sizes of captured steps: which steps share a graph, and how they are padded. Pure arithmetic. Called by `StepGraphs`.

Steps of one token for each row (decode) share graphs by rows and longest context. Short steps with a few prompts share
them by rows, tokens and longest context, and one kernel attends for all rows. Larger steps with prompts are padded to
few numbers of rows and serve all contexts; their rows are told apart on the device (`attention.base.RowParts`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from tokenmill.engine.plan import Row

SMALLEST_KV_BOUND = 1024
"""Contexts up to this many tokens share graphs."""

MANY_ROWS = 64
"""From so many decode rows on there is one graph for all contexts: they fill the device without being split."""

SHORT_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512)
"""Tokens of short steps with prompts."""

SHORT_ROWS = (1, 2, 4, 8, 16)
"""Rows of short steps with prompts; steps of as many tokens and more rows are large ones."""

MAX_PADDED_TOKENS = 1024
"""Up to here steps are padded however much it is; larger ones take longer for their tokens than for their launches, so
that more than a tenth of padding would cost more than it gains."""

MAX_CAPTURED_TOKENS = 8192
"""Larger steps keep the device busy without graphs."""

FEWEST_ROWS = 4
"""Rows of large steps: so many, or 4 times as many, and so on. With few the contexts of decode rows are split more."""

FEWEST_PROMPTS = 16
TOKENS_PER_PROMPT = 64
"""A large step has room for so many rows of several tokens, or for one for each so many tokens."""


class StepSize(NamedTuple):
    """What a graph is captured for.

    Args:
        num_rows: rows, padding included.
        num_tokens: tokens of steps with prompts, padding included; 0: each row computes one token.
        max_kv_len: longest context.
        greedy: whether the tokens are chosen in the graph.
        num_prompts: most rows of several tokens with history, and most without; 0: rows are not told apart.
    """

    num_rows: int
    num_tokens: int
    max_kv_len: int
    greedy: bool
    num_prompts: int = 0

    def holds(self, other: StepSize) -> bool:
        """Whether a step of the other size can run in this one, with the same kernels but for its padding."""
        same = (self.num_tokens, self.greedy, self.num_prompts) == (other.num_tokens, other.greedy, other.num_prompts)
        return same and self.num_rows >= other.num_rows and self.max_kv_len >= other.max_kv_len


def step_size(
    rows: Sequence[Row], max_batch_size: int, max_seq_len: int, max_tokens: int, *, greedy: bool
) -> StepSize | None:
    """The size of the graph for a step with these rows; None: there is none.

    Args:
        rows: those of one token first.
        max_batch_size: most rows of a step.
        max_seq_len: tokens of the longest sequence.
        max_tokens: of the largest step with prompts that is captured.
        greedy: whether the most likely tokens are all that is wanted.
    """
    if any(row.prompt_logprobs for row in rows):
        return None
    kv_len = max(row.start + row.num_tokens for row in rows)
    if all(row.num_tokens == 1 and row.sample for row in rows):
        num_rows = batch_bucket(len(rows), max_batch_size)
        return StepSize(num_rows, 0, kv_bucket(kv_len, max_seq_len, num_rows), greedy)
    num_tokens = token_bucket(sum(row.num_tokens for row in rows), max_tokens)
    if num_tokens is None:
        return None
    if num_tokens <= SHORT_TOKENS[-1] and len(rows) <= SHORT_ROWS[-1]:
        num_rows = _next(SHORT_ROWS, len(rows))
        return StepSize(num_rows, num_tokens, kv_bucket(kv_len, max_seq_len, num_rows), greedy)
    size = large_size(len(rows), num_tokens, max_batch_size, max_seq_len, greedy=greedy)
    return size if sum(row.num_tokens > 1 for row in rows) <= size.num_prompts else None


def large_size(num_rows: int, num_tokens: int, max_batch_size: int, max_seq_len: int, *, greedy: bool) -> StepSize:
    """The size of a large step with prompts, padded to `num_tokens`."""
    bound = FEWEST_ROWS
    while bound < num_rows:
        bound *= 4
    num_prompts = max(FEWEST_PROMPTS, num_tokens // TOKENS_PER_PROMPT)
    return StepSize(min(bound, max_batch_size, num_tokens), num_tokens, max_seq_len, greedy, num_prompts)


def batch_bucket(num_rows: int, max_batch_size: int) -> int:
    """Rows of the step that runs `num_rows` decode rows: 1, 2, 4, then multiples of about an eighth."""
    if num_rows <= 2:
        return num_rows
    step = max(4, 1 << max(0, (num_rows - 1).bit_length() - 3))
    return min(-(-num_rows // step) * step, max(max_batch_size, num_rows))


def token_bucket(num_tokens: int, max_tokens: int) -> int | None:
    """Tokens of the captured step that runs `num_tokens` with prompts among them, `max_tokens` at most; None: none."""
    if num_tokens > max_tokens:
        return None
    if num_tokens <= SHORT_TOKENS[-1]:
        return min(_next(SHORT_TOKENS, num_tokens), max_tokens)
    step = max(256, 1 << ((num_tokens - 1).bit_length() - 4))  # an eighth of an octave
    bucket = min(-(-num_tokens // step) * step, max_tokens)
    return bucket if bucket <= max(MAX_PADDED_TOKENS, 1.1 * num_tokens) else None


def kv_bucket(kv_len: int, max_seq_len: int, num_rows: int) -> int:
    """Longest context of the step that runs rows of up to `kv_len` tokens."""
    if num_rows >= MANY_ROWS:
        return max_seq_len
    return min(max(SMALLEST_KV_BOUND, 1 << (kv_len - 1).bit_length()), max_seq_len)


def _next(sizes: Sequence[int], value: int) -> int:
    return sizes[bisect_left(sizes, value)]
