"""`POST /v1/completions`: one prompt or many in, `n` continuations of each out, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from tokenmill.errors import InvalidParameterError
from tokenmill.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from tokenmill.sampling_params import SamplingParams
from tokenmill.server.documentation import GENERATION_ERRORS, event_stream
from tokenmill.server.openai.generation import (
    EventStreamResponse,
    collect,
    finish_reason,
    json_response,
    reply_identity,
    server_sent_events,
    stream,
    submit_all,
    usage,
)
from tokenmill.server.openai.logprobs import CompletionLogprobsBuilder, TokenTexts, prompt_logprobs
from tokenmill.server.openai.sampling import client_names, to_sampling_params
from tokenmill.server.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from tokenmill.server.schemas import CompletionRequest
from tokenmill.server.state import ServerState, State
from tokenmill.server.strict_json import StrictJsonRoute

if TYPE_CHECKING:
    from tokenmill.executor.result import GenerationResult

router = APIRouter(tags=["OpenAI"], route_class=StrictJsonRoute)

_DEFAULT_MAX_TOKENS = 16


@router.post(
    "/v1/completions", response_model=None, responses={**event_stream(Completion, "Completion"), **GENERATION_ERRORS}
)
async def create_completion(body: CompletionRequest, request: Request, state: State) -> Response:
    """Continue prompts. With `stream`, events of `Completion`, then `[DONE]`."""
    state.check_model(body.model)
    prompts = _prompts(body)
    results = await state.tokenizing.run(_submit, body, prompts, state)
    reply = _Reply(body, prompts, state)
    if body.stream:
        return EventStreamResponse(server_sent_events(reply.chunks(results)), results)
    outputs = await collect(results, request.receive, state.metrics.requests)
    return json_response(reply.completion(outputs))


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """One entry for each prompt: text or token ids."""
    prompt: Any = body.prompt
    is_single = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if is_single else prompt


def _submit(body: CompletionRequest, prompts: list[str | list[int]], state: ServerState) -> list[GenerationResult]:
    for prompt in prompts:
        if isinstance(prompt, str):
            state.tokenizing.check_length(len(prompt), "prompt")
    with client_names({"prompt_token_ids": "prompt", "bad": "bad_words"}):
        sampling = _sampling_params(body)
        return submit_all(
            partial(
                state.llm.generate_async,
                {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt},
                sampling,
                streaming=bool(body.stream),
                priority=0.5 if body.priority is None else body.priority,
                timeout=body.timeout,
            )
            for prompt in prompts
        )


def _sampling_params(body: CompletionRequest) -> SamplingParams:
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0:
        if not body.echo:
            raise InvalidParameterError(
                "max_tokens is 0, which leaves nothing to return.", field="max_tokens", remedy="Set echo, or raise it."
            )
        max_tokens = 1  # the one token is dropped: an echo of the prompt alone, for its log-probabilities
    computed: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:
        computed["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    if body.add_special_tokens is not None:
        computed["add_special_tokens"] = body.add_special_tokens
    return to_sampling_params(body, **computed)


class _Choice:
    """Formats one continuation of one prompt, piece by piece.

    Args:
        reply: of the whole request.
        prompt_index: which prompt.
        index: number of the choice in the response.
    """

    def __init__(self, reply: _Reply, prompt_index: int, index: int) -> None:
        self._reply = reply
        self._index = index
        self._prompt_index = prompt_index
        self._is_started = False
        self.is_ended = False
        body = reply.body
        self._logprobs = (
            None
            if body.logprobs is None
            else CompletionLogprobsBuilder(
                reply.texts, body.logprobs, hides_special_tokens=body.skip_special_tokens is not False
            )
        )

    def piece(self, output: RequestOutput, completion: CompletionOutput) -> CompletionChoice:
        """What is new in the choice since the last piece; the first one brings the echoed prompt."""
        text, entries = "", []
        if self._reply.body.echo and not self._is_started:
            text = self._reply.prompt_text(self._prompt_index, output)
            entries.append(self._prompt_entries(text, output))
        self._is_started = True
        if self._reply.body.max_tokens != 0:
            text += completion.text_diff
            entries.append(self._entries(completion.token_ids_diff, completion.logprobs_diff))
        choice = CompletionChoice(
            index=self._index, text=text, logprobs=_join(entries), finish_reason=finish_reason(completion)
        )
        if choice.finish_reason is not None:
            self.is_ended = True
            choice.stop_reason = completion.stop_reason
            if self._reply.body.max_tokens == 0:
                choice.finish_reason, choice.stop_reason = "length", None
        return choice

    def _entries(self, token_ids: list[int], logprobs: list[TokenLogprobs]) -> CompletionLogprobs | None:
        return None if self._logprobs is None else self._logprobs.add(token_ids, logprobs)

    def _prompt_entries(self, text: str, output: RequestOutput) -> CompletionLogprobs | None:
        if self._logprobs is None:
            return None
        return self._logprobs.add_prompt(text, output.prompt_token_ids, output.outputs[0].prompt_logprobs)


class _Reply:
    """Formats what one request gave."""

    def __init__(self, body: CompletionRequest, prompts: list[str | list[int]], state: ServerState) -> None:
        self.body = body
        self.texts = TokenTexts(state.llm.tokenizer)
        self._prompts = prompts
        self._histograms = state.metrics.requests
        self._tokenizer = state.llm.tokenizer
        self._num_choices = body.n or 1
        self._identity = reply_identity("cmpl", state.model_name)

    def completion(self, outputs: list[RequestOutput]) -> Completion:
        """The whole answer: the choices of the first prompt, then those of the second, and so on."""
        choices = []
        for prompt_index, output in enumerate(outputs):
            for completion in output.outputs:
                choice = self._choice(prompt_index, completion.index).piece(output, completion)
                if self.body.prompt_logprobs is not None:
                    choice.prompt_logprobs = prompt_logprobs(
                        self.texts, output.prompt_token_ids, output.outputs[0].prompt_logprobs
                    )
                choices.append(choice)
        return Completion(**self._identity, object="text_completion", choices=choices, usage=self._usage(outputs))

    async def chunks(self, results: list[GenerationResult]) -> AsyncGenerator[Completion, None]:
        """The answer piece by piece, and the usage if asked for."""
        choices = {
            (prompt_index, index): self._choice(prompt_index, index)
            for prompt_index in range(len(results))
            for index in range(self._num_choices)
        }
        last: dict[int, RequestOutput] = {}
        include_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        async with aclosing(stream(results, self._histograms)) as outputs:
            async for prompt_index, output in outputs:
                last[prompt_index] = output
                for completion in output.outputs:
                    choice = choices[prompt_index, completion.index]
                    if choice.is_ended:
                        continue
                    piece = choice.piece(output, completion)
                    if piece.text or piece.finish_reason is not None or (piece.logprobs and piece.logprobs.tokens):
                        chunk = Completion(**self._identity, object="text_completion", choices=[piece])
                        if include_usage:
                            chunk.usage = None  # sent as null until the last chunk brings it
                        yield chunk
        if include_usage:
            yield Completion(
                **self._identity,
                object="text_completion",
                choices=[],
                usage=self._usage([last[index] for index in sorted(last)]),
            )

    def prompt_text(self, prompt_index: int, output: RequestOutput) -> str:
        """A prompt as the client wrote it, or its token ids as text."""
        prompt = self._prompts[prompt_index]
        if isinstance(prompt, str) and self.body.truncate_prompt_tokens is None:
            return prompt
        return "" if self._tokenizer is None else self._tokenizer.decode(output.prompt_token_ids)

    def _choice(self, prompt_index: int, index: int) -> _Choice:
        return _Choice(self, prompt_index, prompt_index * self._num_choices + index)

    def _usage(self, outputs: list[RequestOutput]) -> Usage:
        counted = usage(outputs)
        if self.body.max_tokens == 0:
            counted.completion_tokens, counted.total_tokens = 0, counted.prompt_tokens
        return counted


def _join(pieces: list[CompletionLogprobs | None]) -> CompletionLogprobs | None:
    joined: CompletionLogprobs | None = None
    for piece in pieces:
        if piece is None or joined is None:
            joined = piece
            continue
        joined.tokens += piece.tokens
        joined.token_logprobs += piece.token_logprobs
        joined.top_logprobs += piece.top_logprobs
        joined.text_offset += piece.text_offset
    return joined
