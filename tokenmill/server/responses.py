"""Bodies of responses and stream events, with OpenAI's names; `schemas.py` has those of requests.

Endpoints set exactly the fields that OpenAI sends in that place; what was not set is not sent.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ResponseSchema(BaseModel):
    """Base of everything the server sends. Only fields that were set are sent, so that null and absent differ."""

    def to_json(self) -> bytes:
        """The fields that were set, as JSON."""
        return self.model_dump_json(exclude_unset=True).encode()


class PromptTokensDetails(ResponseSchema):
    """What is known about the prompt's tokens."""

    cached_tokens: int


class Usage(ResponseSchema):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenLogprob(ResponseSchema):
    """One token of a chat answer and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob):
    """The same, with the most likely tokens at its position."""

    top_logprobs: list[TokenLogprob]


class ChoiceLogprobs(ResponseSchema):
    """Log-probabilities of a chat answer or of a piece of it."""

    content: list[ContentLogprob]
    refusal: None


class PromptLogprob(ResponseSchema):
    """Log-probability of a token at one position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each prompt token, by token id; None for the first."""


class AssistantMessage(ResponseSchema):
    """A chat answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(ResponseSchema):
    """One of a request's `n` chat answers."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it."""
    prompt_logprobs: PromptLogprobs | None = None


class ChatCompletion(ResponseSchema):
    """Response of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(ResponseSchema):
    """What is new in a chat answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class ChatChunkChoice(ResponseSchema):
    """What is new in one of a request's `n` chat answers."""

    index: int
    delta: ChatDelta
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None


class ChatCompletionChunk(ResponseSchema):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(ResponseSchema):
    """Log-probabilities of a text completion; `text_offset` counts characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseSchema):
    """One completion, or what is new in it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(ResponseSchema):
    """Response of `POST /v1/completions`, and one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(ResponseSchema):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Longest prompt plus answer, in tokens."""


class ModelList(ResponseSchema):
    """Response of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class ErrorDetail(ResponseSchema):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(ResponseSchema):
    """Every answer that is not a success."""

    error: ErrorDetail
