"""`RequestConverter`: from a `Request` to the engine's `GenerationRequest`, with the checks that need the model."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass

from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.validation import check_bans
from tokenmill.errors import InvalidParameterError, PromptTooLongError, RequestTooLargeError
from tokenmill.executor.low_level.request import Request
from tokenmill.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestConverter:
    """Knows the model's limits.

    Args:
        vocab_size: token ids are below it.
        end_ids: the model's own end tokens.
        max_seq_len: longest prompt plus answer.
        max_prompt_len: longest prompt that a step can take; None: prompts are split over steps.
        max_num_sequences: most sequences that run at the same time.
    """

    vocab_size: int
    end_ids: tuple[int, ...]
    max_seq_len: int
    max_prompt_len: int | None
    max_num_sequences: int

    def convert(self, request_id: int, request: Request) -> GenerationRequest:
        """The engine's request.

        Raises:
            InvalidParameterError: a token is not in the vocabulary, or there are too many sequences.
            AllTokensBannedError: no token is left for the answer.
            PromptTooLongError, RequestTooLargeError: the prompt is too long.
        """
        self._check_vocabulary(request)
        self._check_size(request)
        config = request.sampling_config
        converted = GenerationRequest(
            request_id=request_id,
            prompt_token_ids=request.input_token_ids,
            sampling=_sampling_params(request),
            seed=secrets.randbits(63) if config.seed is None else config.seed,
            end_ids=self._end_ids(request),
            stop_token_ids=tuple(word[0] for word in request.stop_words if len(word) == 1),
            bad_words=request.bad_words,
            priority=request.priority,
            arrival_time=time.monotonic(),
            stop_words=tuple(word for word in request.stop_words if len(word) > 1),
        )
        check_bans(converted, self.vocab_size, "bad_words")
        return converted

    def _end_ids(self, request: Request) -> tuple[int, ...]:
        if request.end_id is None:
            return self.end_ids
        return () if request.end_id == -1 else (request.end_id,)

    def _check_vocabulary(self, request: Request) -> None:
        self._check_token_ids("input_token_ids", request.input_token_ids)
        self._check_token_ids("end_id", () if request.end_id in (None, -1) else self._end_ids(request))
        for word in request.bad_words:
            self._check_token_ids("bad_words", word)
        for word in request.stop_words:
            self._check_token_ids("stop_words", word)

    def _check_token_ids(self, field: str, token_ids: Iterable[int]) -> None:
        largest = max(token_ids, default=0)
        if largest >= self.vocab_size:
            raise InvalidParameterError(
                f"{field}: token id {largest} is not in the vocabulary (0 to {self.vocab_size - 1}).",
                field=field,
                remedy="Use the tokenizer that belongs to the model.",
            )

    def _check_size(self, request: Request) -> None:
        num_tokens = len(request.input_token_ids)
        if num_tokens >= self.max_seq_len:
            raise PromptTooLongError(
                f"input_token_ids has {num_tokens} tokens; prompt and answer together may have {self.max_seq_len}.",
                field="input_token_ids",
                remedy=f"Shorten it to at most {self.max_seq_len - 1} tokens.",
            )
        if self.max_prompt_len is not None and num_tokens > self.max_prompt_len:
            raise RequestTooLargeError(
                f"input_token_ids has {num_tokens} tokens, more than one step may have ({self.max_prompt_len}).",
                field="input_token_ids",
                remedy="Set ExecutorConfig.enable_chunked_context=True or raise max_num_tokens.",
            )
        num_sequences = request.sampling_config.num_return_sequences
        if num_sequences > self.max_num_sequences:
            raise InvalidParameterError(
                f"num_return_sequences is {num_sequences}; at most {self.max_num_sequences} run at the same time.",
                field="num_return_sequences",
                remedy="Ask for fewer, or raise ExecutorConfig.max_batch_size (and max_num_tokens).",
            )


def _sampling_params(request: Request) -> SamplingParams:
    config = request.sampling_config
    return SamplingParams(
        max_tokens=request.max_tokens,
        min_tokens=config.min_tokens,
        n=config.num_return_sequences,
        seed=config.seed,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty,
        logprobs=0 if request.output_config.return_log_probs else None,
        detokenize=False,
    )
