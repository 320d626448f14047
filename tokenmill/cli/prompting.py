"""From a question to token ids and sampling parameters, the same way for `run` and `chat`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenmill.cli.conversation import Message
from tokenmill.cli.options import DEFAULT_MAX_TOKENS
from tokenmill.errors import PromptTooLongError, UserError

if TYPE_CHECKING:
    from tokenmill.llm import LLM
    from tokenmill.sampling_params import SamplingParams


def has_chat_template(llm: LLM) -> bool:
    """Whether the model says how a conversation is written."""
    return llm.tokenizer is not None and llm.tokenizer.has_chat_template


def require_chat_template(llm: LLM) -> None:
    """Refuse a model that cannot chat.

    Raises:
        UserError: it has no chat template.
    """
    if not has_chat_template(llm):
        raise UserError(
            f"{llm.model_name} has no chat template: it continues text and does not answer.",
            field="model",
            remedy="Use 'tokenmill run --raw', or an instruction-tuned model.",
        )


def chat_token_ids(llm: LLM, messages: list[Message]) -> list[int]:
    """The prompt that asks for an answer to `messages`.

    Raises:
        UserError: the model's template refuses them (some know no system message).
    """
    assert llm.tokenizer is not None
    return llm.tokenizer.apply_chat_template(messages)


def sampling_for_room(llm: LLM, values: dict[str, Any], num_prompt_tokens: int) -> SamplingParams:
    """Sampling parameters whose `max_tokens` is at most what the context has left after the prompt.

    Raises:
        PromptTooLongError: nothing is left.
    """
    from tokenmill.sampling_params import SamplingParams

    room = llm.max_seq_len - num_prompt_tokens
    if room < 1:
        raise PromptTooLongError(
            f"The prompt has {num_prompt_tokens} tokens; the context has room for {llm.max_seq_len}, answer included.",
            field="prompt",
            remedy="Shorten it, or allow more with --max-seq-len.",
        )
    return SamplingParams(**{**values, "max_tokens": min(values.get("max_tokens") or DEFAULT_MAX_TOKENS, room)})
