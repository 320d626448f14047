"""`GenerationRequest`: what a caller asks of an engine, as plain data that can cross a process boundary."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request as it enters the engine; nobody changes it afterwards.

    Args:
        request_id: unique in the engine.
        prompt_token_ids: at least one token.
        sampling: how tokens are chosen; `n`/`best_of` make several sequences.
        seed: 64-bit seed (the caller's, or a fresh one).
        end_ids: tokens that end a sequence with `stop` (the model's end tokens, or `sampling.end_id`; empty with
            `ignore_eos`).
        stop_token_ids: tokens of the caller that end a sequence with `stop` and `stop_reason`.
        bad_words: token sequences that must not be generated.
        stop_words: token sequences of the caller that end a sequence with `stop`, and the last of their tokens as
            `stop_reason`. They are not part of the answer, and no token of one is told before it is known not to be,
            unless `include_stop_str_in_output`.
        streaming: somebody reads the answer as it comes; else several steps may be told at once.
        priority: higher runs first under the priority queue; its cached blocks are evicted later under any.
        arrival_time: `time.monotonic()` at submission, seconds.
    """

    request_id: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int = 0
    end_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    priority: float = 0.5
    arrival_time: float = 0.0
    stop_words: tuple[tuple[int, ...], ...] = ()
    streaming: bool = False
