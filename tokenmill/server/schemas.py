"""Bodies of requests, with OpenAI's names; fields beyond OpenAI's are those that vLLM's users know.

Types are strict: a string is not a number. A field of another name is refused with a did-you-mean, and a field that
OpenAI or vLLM know but tokenmill cannot honour is refused by name, unless it asks for nothing. Ranges of sampling
parameters are checked by `SamplingParams`, not here; the JSON schema names them all the same (`documentation.py`), and
`rules` are what it says of several fields together.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from tokenmill.errors import UnknownParameterError, UnsupportedFeatureError, did_you_mean
from tokenmill.server.documentation import BY_MODEL, Schema, complete_schema, given, never, requires


def _whole_numbers(value: Any) -> Any:
    """JSON has one kind of number: 2.0 stands for the integer 2, alone or in a list."""
    if isinstance(value, list) and float in set(map(type, value)):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


MAX_LOGPROBS = 1024
Text = Annotated[str, Field(min_length=1)]
# The range comes first, so that it also stands in the JSON schema.
Integer = Annotated[int, BeforeValidator(_whole_numbers)]
Count = Annotated[int, Field(ge=0, lt=2**31), BeforeValidator(_whole_numbers)]
PositiveCount = Annotated[int, Field(ge=1, lt=2**31), BeforeValidator(_whole_numbers)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), BeforeValidator(_whole_numbers)]
TopK = Annotated[int, Field(ge=-1, lt=2**31), BeforeValidator(_whole_numbers)]
NumSequences = Annotated[Integer, Field(json_schema_extra={BY_MODEL: "num_sequences"})]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_PromptId = Annotated[_TokenId, Field(json_schema_extra={BY_MODEL: "prompt_id"})]
_PromptText = Annotated[str, Field(json_schema_extra={BY_MODEL: "prompt_text"})]
TokenIds = Annotated[list[_TokenId], Field(fail_fast=True), BeforeValidator(_whole_numbers)]
PromptIds = Annotated[list[_PromptId], Field(min_length=1, fail_fast=True), BeforeValidator(_whole_numbers)]


def _kind_of_strings(value: Any) -> str | None:
    if isinstance(value, str):
        return "string"
    return "list" if isinstance(value, list) else None


def _kind_of_prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return "string"
    if not isinstance(value, list) or not value:
        return None
    return {str: "strings", int: "token_ids", float: "token_ids", list: "token_id_lists"}.get(type(value[0]))


Strings = Annotated[
    Annotated[Text, Tag("string")] | Annotated[list[Text], Field(max_length=256, fail_fast=True), Tag("list")],
    Discriminator(
        _kind_of_strings,
        custom_error_type="strings_type",
        custom_error_message="Input should be a string or a list of strings",
    ),
]
Prompt = Annotated[
    Annotated[_PromptText, Tag("string")]
    | Annotated[list[_PromptText], Field(min_length=1, fail_fast=True), Tag("strings")]
    | Annotated[PromptIds, Tag("token_ids")]
    | Annotated[list[PromptIds], Field(min_length=1, fail_fast=True), Tag("token_id_lists")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string, a list of strings, token ids, or a list of token id lists",
    ),
]


MAX_TIMEOUT = 86_400.0
"""Longest `timeout` of a request, in seconds."""
_LOGIT_BIAS: Schema = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}

TEMPLATE_ARGUMENTS = ("self", "messages", "chat_template", "tokenize", "add_generation_prompt", "tools")
"""What `chat_template_kwargs` may not set, because the server does."""
_TEMPLATE_VARIABLES: Schema = {"type": "object", "propertyNames": {"not": {"enum": list(TEMPLATE_ARGUMENTS)}}}


class RequestSchema(BaseModel):
    """Base of everything a client sends: strict types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Known fields that are refused, unless empty, false, or one of the values given here."""
    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Known fields that change nothing about an answer and are dropped."""
    rules: ClassVar[tuple[Schema, ...]] = ()
    """What several fields have to satisfy together, as JSON schemas: for the documentation, checked elsewhere."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        complete_schema(schema, rules=cls.rules, unsupported=cls.unsupported, without_effect=cls.without_effect)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        accepted = {}
        for name, value in data.items():
            if name in cls.model_fields:
                accepted[name] = value
            elif name in cls.unsupported:
                neutral = (None, False, "", [], {}, *cls.unsupported[name])
                if not any(type(value) is type(allowed) and value == allowed for allowed in neutral):
                    raise UnsupportedFeatureError(
                        f"'{name}' is not supported by this server.", field=name, remedy="Leave it out."
                    )
            elif name not in cls.without_effect:
                raise UnknownParameterError(
                    f"Unrecognized request argument: '{name}'.", field=name, remedy=did_you_mean(name, cls.model_fields)
                )
        return accepted


_UNSUPPORTED_BY_ALL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "logits_processors": (),
    "logits_processor": (),
    "use_beam_search": (),
    "length_penalty": (1.0, 1),
    "early_stopping": (),
    "allowed_token_ids": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "structured_outputs": (),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (),
    "return_token_ids": (),
    "lora_request": (),
    "kv_transfer_params": (),
}


_STREAMED = given("stream", const=True)
_SAMPLED = {"properties": {"temperature": {"not": {"const": 0}}, "top_k": {"not": {"const": 1}}}}
_SAMPLING_RULES = (
    requires(given("stream_options"), _STREAMED),
    never(given("prompt_logprobs"), _STREAMED),
    requires(given("n", minimum=2), _SAMPLED),
    requires(given("best_of", minimum=2), _SAMPLED),
)


class StreamOptions(RequestSchema):
    """What a stream tells besides the answer."""

    unsupported = {"include_obfuscation": (), "continuous_usage_stats": ()}

    include_usage: bool = False
    """Send one more chunk, before the end, with the usage of the whole request."""


class GenerationFields(RequestSchema):
    """How a request is run and its answer sent."""

    without_effect = frozenset({"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "metadata"})

    stream: bool | None = None
    """Send the answer in pieces, as server-sent events."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT)] | None = None
    """Seconds from the request's arrival to the end of its answer; when they pass it ends with an error (504)."""

    priority: float | None = None
    """Higher runs first, if the server's waiting queue goes by priority. Default 0.5."""


class SamplingFields(GenerationFields):
    """What chat and text completions have in common."""

    n: NumSequences | None = None
    """Answers to return."""
    best_of: NumSequences | None = None
    """Answers to generate, of which the `n` most likely are returned. Not with `stream`."""
    seed: Integer | None = None
    """Makes sampling repeatable."""
    temperature: float | None = None
    """Logits are divided by it; 0 is greedy. Default 1."""
    top_p: float | None = None
    """Sample from the smallest set of tokens whose probabilities sum to it. Default 1."""
    top_k: TopK | None = None
    """Sample from the k most likely tokens; 0 or -1: from all."""
    min_p: float | None = None
    """Drop tokens less likely than this share of the most likely token's probability."""
    repetition_penalty: float | None = None
    """Positive logits of tokens in the prompt or answer are divided by it, negative ones multiplied."""
    presence_penalty: float | None = None
    """Subtracted from the logits of tokens that are in the answer."""
    frequency_penalty: float | None = None
    """Subtracted from logits once for each time the token is in the answer."""
    logit_bias: Annotated[dict[str, float], WithJsonSchema(_LOGIT_BIAS)] | None = None
    """Added to logits, by token id; -100 bans a token, 100 forces it."""

    max_tokens: Count | None = None
    """Most tokens to generate."""
    min_tokens: Count | None = None
    """End tokens and stop tokens are banned before this many tokens, and stop strings do not count before them."""
    ignore_eos: bool | None = None
    """Go on after the model's end token."""
    stop: Strings | None = None
    """Strings that end the answer."""
    stop_token_ids: TokenIds | None = None
    """Tokens that end the answer."""
    include_stop_str_in_output: bool | None = None
    """Keep the stop string in the answer."""
    bad_words: list[Text] | None = None
    """Words that must not be generated."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text. Default true."""
    prompt_logprobs: NumLogprobs | None = None
    """Log-probabilities to return for each prompt token but the first. Not with `stream`."""
    truncate_prompt_tokens: PositiveCount | None = None
    """Keep only the last tokens of the prompt."""


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions`."""

    unsupported = {**_UNSUPPORTED_BY_ALL, "suffix": (), "prompt_embeds": ()}
    rules = (*_SAMPLING_RULES, requires(given("max_tokens", const=0), given("echo", const=True)))

    model: str | None = None
    """Name of the served model; may be left out."""
    prompt: Prompt
    """Text or token ids, or a list of either."""
    echo: bool | None = None
    """Return the prompt before the answer."""
    logprobs: NumLogprobs | None = None
    """Log-probabilities to return for each token: its own and this many of the most likely ones."""
    add_special_tokens: bool | None = None
    """Let the tokenizer add its special tokens to a text prompt. Default true."""


class ContentPart(RequestSchema):
    """One piece of a message's content; only text is supported."""

    unsupported = {"image_url": (), "input_audio": (), "video_url": (), "audio_url": (), "file": (), "refusal": ()}

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("string")] | Annotated[list[ContentPart], Field(fail_fast=True), Tag("list")],
    Discriminator(
        _kind_of_strings,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of content parts",
    ),
]


class ChatMessage(RequestSchema):
    """One message of a conversation."""

    unsupported = {"tool_calls": (), "tool_call_id": (), "function_call": (), "audio": (), "reasoning": ()}
    without_effect = frozenset({"refusal", "annotations", "reasoning_content"})

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks; `developer` is another name for `system`."""
    content: Content
    """What is said."""
    name: str | None = None
    """Name of the speaker, for chat templates that use it."""

    def to_template(self) -> dict[str, str]:
        """The message as chat templates know it: content is one string."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatCompletionRequest(SamplingFields):
    """Body of `POST /v1/chat/completions`."""

    unsupported = {
        **_UNSUPPORTED_BY_ALL,
        "tools": (),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True,),
        "functions": (),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
        "service_tier": ("auto", "default"),
        "store": (),
        "chat_template": (),
        "documents": (),
        "echo": (),
        "continue_final_message": (),
        "add_special_tokens": (),
        "mm_processor_kwargs": (),
        "media_io_kwargs": (),
    }
    rules = (*_SAMPLING_RULES, requires(given("top_logprobs"), given("logprobs", const=True)))

    model: str | None = None
    """Name of the served model; may be left out."""
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    """The conversation so far."""
    max_tokens: PositiveCount | None = None
    """Most tokens to generate."""
    max_completion_tokens: PositiveCount | None = None
    """Most tokens to generate; stands before `max_tokens`. Default: the rest of the context."""
    logprobs: bool | None = None
    """Return the log-probability of each token."""
    top_logprobs: NumLogprobs | None = None
    """Most likely tokens to return at each position. Only with `logprobs`."""
    add_generation_prompt: bool | None = None
    """End the prompt with the start of an assistant's message. Default true."""
    chat_template_kwargs: Annotated[dict[str, Any], WithJsonSchema(_TEMPLATE_VARIABLES)] | None = None
    """Variables for the chat template."""
