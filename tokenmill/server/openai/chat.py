"""`POST /v1/chat/completions`: a conversation in, one or more answers out, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
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
    usage,
)
from tokenmill.server.openai.logprobs import TokenTexts, chat_logprobs, prompt_logprobs
from tokenmill.server.openai.sampling import client_names, room_for_answer, to_sampling_params
from tokenmill.server.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChoiceLogprobs,
)
from tokenmill.server.schemas import TEMPLATE_ARGUMENTS, ChatCompletionRequest
from tokenmill.server.state import ServerState, State
from tokenmill.server.strict_json import StrictJsonRoute

if TYPE_CHECKING:
    from tokenmill.executor.result import GenerationResult

router = APIRouter(tags=["OpenAI"], route_class=StrictJsonRoute)


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={**event_stream(ChatCompletion, "ChatCompletionChunk"), **GENERATION_ERRORS},
)
async def create_chat_completion(body: ChatCompletionRequest, request: Request, state: State) -> Response:
    """Answer a conversation. With `stream`, events of `ChatCompletionChunk`, then `[DONE]`."""
    state.check_model(body.model)
    result = await state.tokenizing.run(_submit, body, state)
    reply = _Reply(body, state)
    histograms = state.metrics.requests
    if body.stream:
        return EventStreamResponse(server_sent_events(reply.chunks(result)), [result])
    [output] = await collect([result], request.receive, histograms)
    return json_response(reply.completion(output))


def _submit(body: ChatCompletionRequest, state: ServerState) -> GenerationResult:
    names = {"prompt_token_ids": "messages", "prompt": "messages", "bad": "bad_words"}
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    if body.top_logprobs is not None:
        names["logprobs"] = "top_logprobs"
    with client_names(names):
        prompt_token_ids = _render(body, state)
        return state.llm.generate_async(
            {"prompt_token_ids": prompt_token_ids},
            _sampling_params(body, state, len(prompt_token_ids)),
            streaming=bool(body.stream),
            priority=0.5 if body.priority is None else body.priority,
            timeout=body.timeout,
        )


def _render(body: ChatCompletionRequest, state: ServerState) -> list[int]:
    """The conversation as token ids."""
    tokenizer = state.llm.tokenizer
    if tokenizer is None:
        raise InvalidParameterError(
            "This server runs without a tokenizer.", field="messages", remedy="Use /v1/completions with token ids."
        )
    variables: dict[str, Any] = body.chat_template_kwargs or {}
    for name in variables:
        if name in TEMPLATE_ARGUMENTS:
            raise InvalidParameterError(
                f"chat_template_kwargs cannot set '{name}'.", field="chat_template_kwargs", remedy="Leave it out."
            )
    messages = [message.to_template() for message in body.messages]
    state.tokenizing.check_length(sum(len(message["content"]) for message in messages), "messages")
    token_ids = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        add_generation_prompt=body.add_generation_prompt is not False,
        **variables,
    )
    assert isinstance(token_ids, list)
    return token_ids


def _sampling_params(body: ChatCompletionRequest, state: ServerState, prompt_len: int) -> SamplingParams:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidParameterError(
            "top_logprobs is given without logprobs.", field="top_logprobs", remedy="Set logprobs to true."
        )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if limit is None:
        limit = room_for_answer(state.llm, min(prompt_len, body.truncate_prompt_tokens or prompt_len))
    return to_sampling_params(body, max_tokens=limit, logprobs=(body.top_logprobs or 0) if body.logprobs else None)


class _Reply:
    """Formats what one request gave."""

    def __init__(self, body: ChatCompletionRequest, state: ServerState) -> None:
        self._body = body
        self._histograms = state.metrics.requests
        self._texts = TokenTexts(state.llm.tokenizer)
        self._identity = reply_identity("chatcmpl", state.model_name)

    def completion(self, output: RequestOutput) -> ChatCompletion:
        """The whole answer."""
        return ChatCompletion(
            **self._identity,
            object="chat.completion",
            choices=[self._choice(output, completion) for completion in output.outputs],
            usage=usage([output]),
        )

    async def chunks(self, result: GenerationResult) -> AsyncGenerator[ChatCompletionChunk, None]:
        """The answer piece by piece: roles, text, reasons to end, and the usage if asked for."""
        for index in range(self._body.n or 1):
            yield self._chunk(index, ChatDelta(role="assistant", content="", refusal=None))
        finished: set[int] = set()
        last: RequestOutput | None = None
        async with aclosing(stream([result], self._histograms)) as outputs:
            async for _, last in outputs:
                for completion in last.outputs:
                    if completion.index in finished:
                        continue
                    logprobs = self._logprobs(completion.token_ids_diff, completion.logprobs_diff)
                    if completion.text_diff or (logprobs is not None and logprobs.content):
                        yield self._chunk(completion.index, ChatDelta(content=completion.text_diff), logprobs=logprobs)
                    if completion.finish_reason is not None:
                        finished.add(completion.index)
                        yield self._chunk(completion.index, ChatDelta(), ended=completion)
        if self._include_usage and last is not None:
            yield ChatCompletionChunk(**self._identity, object="chat.completion.chunk", choices=[], usage=usage([last]))

    @property
    def _include_usage(self) -> bool:
        return self._body.stream_options is not None and self._body.stream_options.include_usage

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        *,
        logprobs: ChoiceLogprobs | None = None,
        ended: CompletionOutput | None = None,
    ) -> ChatCompletionChunk:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=None)
        if ended is not None:
            choice.finish_reason = finish_reason(ended)
            choice.stop_reason = ended.stop_reason
        chunk = ChatCompletionChunk(**self._identity, object="chat.completion.chunk", choices=[choice])
        if self._include_usage:
            chunk.usage = None  # sent as null until the last chunk brings it
        return chunk

    def _choice(self, output: RequestOutput, completion: CompletionOutput) -> ChatChoice:
        reason = finish_reason(completion)
        assert reason is not None, "a finished request has a sequence that runs"
        choice = ChatChoice(
            index=completion.index,
            message=AssistantMessage(role="assistant", content=completion.text, refusal=None),
            logprobs=self._logprobs(completion.token_ids, completion.logprobs),
            finish_reason=reason,
            stop_reason=completion.stop_reason,
        )
        if self._body.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(
                self._texts, output.prompt_token_ids, output.outputs[0].prompt_logprobs
            )
        return choice

    def _logprobs(self, token_ids: list[int], logprobs: list[TokenLogprobs]) -> ChoiceLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._texts, token_ids, logprobs, self._body.top_logprobs or 0)
