"""The engine's own state of a request: `Request` with its `Sequence`s. The scheduler is the only writer.

The four counts of a sequence, in tokens from position 0 on:

    num_computed_tokens <= num_scheduled_tokens <= length
                                     len(token_ids) <= length <= max_length

Computed positions have their keys and values in the cache and their step committed; scheduled ones are at least in a
launched step. `length` also counts the tokens that launched steps sample and that the host does not know yet. What is
left to compute is `length - num_scheduled_tokens`: 1 while decoding, more while prefilling (a prompt, or prompt and
answer so far after a preemption). There is no other difference between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias

from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.stop_words import StopWords
from tokenmill.outputs import RequestMetrics, TokenLogprobs

Rank: TypeAlias = tuple[float, int, int]
"""Order between sequences, best first: minus the priority (0 under fcfs), order of arrival, sequence index."""


class SequenceStatus(Enum):
    """Where a sequence is in its life."""

    PENDING = auto()
    """Waits for sequence 0 of its request to compute the prompt."""
    WAITING = auto()
    """In the waiting queue: new, or preempted."""
    RUNNING = auto()
    """Holds a slot and cache blocks."""
    FINISHED = auto()
    """Ended; launched steps may still contain it, and what they sample for it is ignored."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making.

    Attributes:
        id: unique in the scheduler; the key of its block table.
        index: which of the request's sequences.
        rank: its place between running sequences.
        token_ids: prompt and answer so far, as far as the host knows them.
        max_length: prompt plus the most tokens to generate.
        length: see the module.
        slot: while running; else -1.
        num_block_tokens: tokens that its block table has room for.
        num_prompt_logprobs: prompt log-probabilities delivered.
        last_lost_step: the last step planned before its latest preemption: what this step and earlier ones computed is
            gone from the cache; tokens that they sample still count.
        stop_word_state: of `Request.stop_words`, after the last token.
        held: last tokens of the answer that may turn out to be part of a stop word, with their log-probabilities.
    """

    request: Request
    id: int
    index: int
    rank: Rank
    token_ids: list[int]
    max_length: int
    length: int
    status: SequenceStatus = SequenceStatus.PENDING
    slot: int = -1
    num_scheduled_tokens: int = 0
    num_computed_tokens: int = 0
    num_block_tokens: int = 0
    num_prompt_logprobs: int = 0
    num_preemptions: int = 0
    last_lost_step: int = -1
    stop_word_state: int = 0
    held: list[tuple[int, TokenLogprobs | None]] = field(default_factory=list)

    @property
    def num_tokens_in_flight(self) -> int:
        """Tokens that launched steps sample and the host has not read."""
        return self.length - len(self.token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens of the answer that the host knows."""
        return len(self.token_ids) - self.request.num_prompt_tokens

    @property
    def started(self) -> bool:
        """Whether work was spent on it: it was preempted, or its sibling computed the prompt for it."""
        return self.num_preemptions > 0 or self.index > 0


@dataclass(slots=True, eq=False)
class Request:
    """A request in the engine.

    Attributes:
        inputs: what the caller asked for.
        metrics: when things happened; goes out with the terminal event.
        stop_token_ids: the caller's stop tokens.
        ending_token_ids: those and the model's end tokens.
        min_tokens: tokens of the answer before any of these, or a stop word, may end it.
        stop_words: the caller's stop words; None if there are none.
        is_watched: tokens should be told soon: somebody reads them, or they may end the answer by what they say.
        sequences: by sequence index.
        num_unfinished: sequences that have not ended.
        siblings_are_pending: the other sequences wait for sequence 0 to compute the prompt.
    """

    inputs: GenerationRequest
    metrics: RequestMetrics
    stop_token_ids: frozenset[int]
    ending_token_ids: frozenset[int]
    min_tokens: int
    stop_words: StopWords | None = None
    is_watched: bool = True
    sequences: list[Sequence] = field(default_factory=list)
    num_unfinished: int = 0
    siblings_are_pending: bool = False

    @property
    def id(self) -> int:
        """The caller's request id."""
        return self.inputs.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.inputs.prompt_token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are asked for; every position must then be computed."""
        return self.inputs.sampling.prompt_logprobs is not None


def make_request(inputs: GenerationRequest, rank: tuple[float, int], max_seq_len: int, first_id: int) -> Request:
    """The engine's state for new `inputs`; its sequences get the ids from `first_id` on."""
    stop_token_ids = frozenset(inputs.stop_token_ids)
    request = Request(
        inputs=inputs,
        metrics=RequestMetrics(arrival_time=inputs.arrival_time),
        stop_token_ids=stop_token_ids,
        ending_token_ids=stop_token_ids | frozenset(inputs.end_ids),
        min_tokens=inputs.sampling.min_tokens or 0,
        stop_words=StopWords(inputs.stop_words) if inputs.stop_words else None,
        is_watched=inputs.streaming or bool(inputs.stop_words or inputs.sampling.stop_strings),
    )
    num_prompt_tokens = request.num_prompt_tokens
    for index in range(inputs.sampling.num_sequences):
        sequence = Sequence(
            request=request,
            id=first_id + index,
            index=index,
            rank=(*rank, index),
            token_ids=list(inputs.prompt_token_ids),
            max_length=min(num_prompt_tokens + inputs.sampling.max_tokens, max_seq_len),
            length=num_prompt_tokens,
        )
        request.sequences.append(sequence)
    request.num_unfinished = len(request.sequences)
    request.siblings_are_pending = len(request.sequences) > 1
    return request
