"""`Tokenizer`: text to token ids and back, chat messages to a prompt.

One class for every source: a Hugging Face directory, a GGUF file, a transformers object (`loading.py` makes them). Used
by `LLM` and the server for prompts, by the detokenizer for answers, and by the engine for the end tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from tokenmill.errors import InvalidParameterError
from tokenmill.tokenization.backends import TokenizerBackend, check_text
from tokenmill.tokenization.chat_template import ChatTemplate
from tokenmill.tokenization.decoder_style import DecoderStyle


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The tokens with a role.

    Args:
        bos_token_id: starts a text.
        eos_token_ids: end an answer; the first is the model's declared end token.
        pad_token_id: fills rows of a batch.
        unk_token_id: stands for what the vocabulary cannot write.
        names: what chat templates see, for example `{"bos_token": "<s>"}`.
    """

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    unk_token_id: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: does the encoding and decoding.
        special_tokens: the tokens with a role.
        chat_templates: Jinja sources by name; `default` is the usual one.
    """

    def __init__(
        self,
        backend: TokenizerBackend,
        special_tokens: SpecialTokens,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self._backend = backend
        self._special_tokens = special_tokens
        self._chat_template = ChatTemplate(chat_templates or {}, special_tokens.names)
        self.all_special_ids: tuple[int, ...] = tuple(sorted(backend.special_ids))
        """Ids that `decode(skip_special_tokens=True)` leaves out, ascending."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in `text` become their ids.

        Args:
            text: any text, also empty.
            add_special_tokens: add what the model was trained to see around a text, such as a start token.

        Raises:
            InvalidParameterError: `text` is no string, or not valid Unicode.
        """
        return self._backend.encode(check_text(text, "prompt"), add_special_tokens)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, in parallel where the library can."""
        return self._backend.encode_batch([check_text(text, "prompt") for text in texts], add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing.

        Raises:
            InvalidParameterError: an id is negative or no integer.
        """
        try:
            return self._backend.decode(token_ids, skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise InvalidParameterError(
                f"token_ids must be a list of integers of 0 or more ({error}).", field="token_ids"
            ) from None

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tokenize: Literal[True] = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tokenize: Literal[False],
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> list[int] | str:
        """The prompt for a conversation.

        Args:
            messages: dicts with `role` and `content` (a string or a list of text parts), oldest first.
            add_generation_prompt: end with the header of the answer.
            tokenize: give token ids (no special tokens are added: the template writes them) or the text.
            tools: JSON schemas of functions that the model may call.
            chat_template: a Jinja source, or the name of one of the model's templates; None: the model's default.
            template_kwargs: further variables of the template, for example `enable_thinking=False`.

        Raises:
            InvalidParameterError: a message is malformed (the text names its index), or the template refuses it.
            UserError: the model has no chat template and none is given.
        """
        text = self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template=chat_template,
            **template_kwargs,
        )
        return self._backend.encode(check_text(text, "messages"), False) if tokenize else text

    def save(self, folder: Path) -> Literal["auto", "slow"]:
        """Write what text and ids need, no chat templates, to an empty folder; `load_tokenizer` reads it in the mode
        that is returned.

        Raises:
            InvalidParameterError: it is an object that cannot be saved.
        """
        return self._backend.save(folder)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary writes it; None if there is none."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it; None outside the vocabulary."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text: a part of a UTF-8 character for some, empty outside the vocabulary."""
        token = self.id_to_token(token_id)
        return b"" if token is None else self._backend.decoder_style.token_bytes(token)

    @property
    def eos_token_id(self) -> int | None:
        """The model's declared end token."""
        return self._special_tokens.eos_token_ids[0] if self._special_tokens.eos_token_ids else None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer: the declared one, and ends of turn that the chat template uses."""
        return self._special_tokens.eos_token_ids

    @property
    def bos_token_id(self) -> int | None:
        """The token that starts a text."""
        return self._special_tokens.bos_token_id

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills rows of a batch."""
        return self._special_tokens.pad_token_id

    @property
    def unk_token_id(self) -> int | None:
        """The token for what the vocabulary cannot write."""
        return self._special_tokens.unk_token_id

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; the model's embedding may have more rows."""
        return self._backend.vocab_size

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a chat template."""
        return bool(self._chat_template.sources)

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The model's chat templates by name."""
        return self._chat_template.sources

    @property
    def decoder_style(self) -> DecoderStyle:
        """How tokens become bytes."""
        return self._backend.decoder_style

    def is_special(self, token_id: int) -> bool:
        """Whether `decode(skip_special_tokens=True)` leaves the token out."""
        return token_id in self._backend.special_ids
