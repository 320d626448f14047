"""A conversation as `chat` keeps it: turns of question and answer, saved as OpenAI-style messages. No model here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenmill.errors import InvalidParameterError, PromptTooLongError

Message = dict[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(slots=True)
class Conversation:
    """Turns so far, after an optional system message."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def messages(self, question: str | None = None) -> list[Message]:
        """Everything so far as chat messages, with `question` at the end."""
        messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        if question is not None:
            messages.append({"role": "user", "content": question})
        return messages

    def fit(self, question: str, count_tokens: Callable[[list[Message]], int], max_tokens: int) -> tuple[int, int]:
        """Drop the oldest turns until the prompt for `question` has at most `max_tokens` tokens.

        Args:
            count_tokens: tokens of the prompt made of the messages.

        Returns:
            (turns dropped, tokens of the prompt).

        Raises:
            PromptTooLongError: the question alone is too long; nothing was dropped.
        """
        num_tokens = count_tokens(self.messages(question))
        if num_tokens <= max_tokens:
            return 0, num_tokens
        shorter = Conversation(self.system, list(self.turns))
        while num_tokens > max_tokens:
            if not shorter.turns:
                raise PromptTooLongError(
                    f"The question has {num_tokens} tokens (with the system message); {max_tokens} fit.",
                    remedy="Shorten it, or allow more with --max-seq-len.",
                )
            del shorter.turns[0]
            num_tokens = count_tokens(shorter.messages(question))
        num_dropped = len(self.turns) - len(shorter.turns)
        self.turns = shorter.turns
        return num_dropped, num_tokens

    def remember(self, question: str, answer: str) -> None:
        """Add a turn."""
        self.turns.append(Turn(question, answer))

    def undo(self) -> Turn | None:
        """Take the last turn back; None when there is none."""
        return self.turns.pop() if self.turns else None

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns.clear()

    def save(self, path: Path) -> None:
        """Write the messages to a JSON file.

        Raises:
            InvalidParameterError: the file cannot be written.
        """
        try:
            path.write_text(json.dumps(self.messages(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidParameterError(f"Cannot write {path}: {error.strerror or error}.", field="file") from None

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what `save` wrote.

        Raises:
            InvalidParameterError: the file cannot be read, or is no conversation.
        """
        try:
            messages = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidParameterError(f"Cannot read {path}: {error.strerror or error}.", field="file") from None
        except ValueError as error:
            raise InvalidParameterError(f"{path} is not JSON: {error}.", field="file") from None
        return cls._from_messages(messages, path)

    @classmethod
    def _from_messages(cls, messages: Any, path: Path) -> Conversation:
        remedy = (
            'It must be a list such as [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}].'
        )
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise InvalidParameterError(f"{path} holds no conversation.", field="file", remedy=remedy)
        conversation = cls()
        if messages and messages[0]["role"] == "system":
            conversation.system = messages[0]["content"]
            messages = messages[1:]
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise InvalidParameterError(
                f"{path}: questions (user) and answers (assistant) do not alternate.", field="file", remedy=remedy
            )
        contents = [message["content"] for message in messages]
        conversation.turns = [Turn(*pair) for pair in zip(contents[::2], contents[1::2], strict=True)]
        return conversation


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("system", "user", "assistant")
        and isinstance(message.get("content"), str)
    )
