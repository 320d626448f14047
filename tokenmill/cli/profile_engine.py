"""Times of an engine's operations on this machine, for `tokenmill inspect ENGINE --profile`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenmill.errors import InvalidParameterError

if TYPE_CHECKING:
    from tokenmill.builder.engine import Engine
    from tokenmill.program.costs import StepSize

TOKENS_PER_BLOCK = 32
NUM_RUNS = 20


def operation_times(engine: Engine, step: StepSize) -> dict[str, float]:
    """Microseconds of each operation by its name: the median of 20 runs of a step of one sequence with random tokens.

    Raises:
        InvalidParameterError: the step is larger than the engine was built for.
        EngineFileError: the engine has no weights.
    """
    import numpy as np  # as torch: after the arguments were checked

    from tokenmill import Session

    limits = engine.config.limits
    for name, size, limit in (
        ("step_tokens", step.num_tokens, limits.max_num_tokens),
        ("context", step.context_len, limits.max_seq_len),
    ):
        if size > limit:
            raise InvalidParameterError(
                f"{name} is {size}, but the engine was built for {limit} at most.",
                field=name,
                remedy=f"Use {limit} or less to measure.",
            )
    num_blocks = -(-step.context_len // TOKENS_PER_BLOCK)
    session = Session(engine, num_blocks=num_blocks + 1, tokens_per_block=TOKENS_PER_BLOCK)
    tokens = np.random.default_rng(0).integers(0, engine.program.output.columns, step.context_len)
    before = step.context_len - step.num_tokens
    for first in range(0, before, limits.max_num_tokens):  # a cache that nobody wrote would be read too quickly
        session.run(_inputs(tokens[first : min(first + limits.max_num_tokens, before)], first, num_blocks))
    times = session.profile(_inputs(tokens[before:], before, num_blocks), num_runs=NUM_RUNS)
    return {one.name: one.seconds * 1e6 for one in times}


def _inputs(tokens: Any, first: int, num_blocks: int) -> dict[str, Any]:
    """A step of one sequence that has `first` tokens in the cache; the logits of its last token are wanted."""
    return {
        "token_ids": tokens,
        "query_start": [0, len(tokens)],
        "kv_lens": [first + len(tokens)],
        "block_tables": [list(range(1, num_blocks + 1))],
        "row_index": [len(tokens) - 1],
    }
