"""Which tokens end an answer: the declared ones, and the end-of-turn tokens that a model's chat template writes.

Many checkpoints declare only the end of a document, while their chat template ends turns with another token; without it
an answer would run on into invented turns. Used by the GGUF and the Hugging Face loaders.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

_END_OF_TURN_TOKENS = (
    "<|im_end|>",  # ChatML: Qwen, SmolLM2, ...
    "<end_of_turn>",  # Gemma
    "<turn|>",  # Gemma 4
    "<|eot_id|>",  # Llama 3
    "<|eom_id|>",  # Llama 3.1, before a tool's result
    "<|eot|>",  # Llama 4
    "<|end|>",  # Phi-3
    "<|end_of_turn|>",
    "<end_of_utterance>",
)


def end_of_turn_ids(
    declared: Iterable[int],
    chat_templates: Collection[str],
    ids: Mapping[str, int],
    special_ids: Collection[int],
) -> tuple[int, ...]:
    """Ids that end an answer, the declared ones first.

    Args:
        declared: end tokens that the checkpoint names.
        chat_templates: sources of the model's chat templates.
        ids: the vocabulary (a lookup of the tokens above is enough).
        special_ids: ids of special tokens; a token that is plain text never ends an answer.
    """
    found = dict.fromkeys(declared)
    for token in _END_OF_TURN_TOKENS:
        token_id = ids.get(token)
        if token_id is None or token_id not in special_ids:
            continue
        # In OpenAI's harmony format <|end|> closes one message of several in an answer; <|return|> ends the answer.
        if token == "<|end|>" and "<|return|>" in ids:
            continue
        if any(token in template for template in chat_templates):
            found[token_id] = None
    return tuple(found)


def end_of_turn_candidates() -> tuple[str, ...]:
    """The tokens that `end_of_turn_ids` looks up."""
    return (*_END_OF_TURN_TOKENS, "<|return|>")
