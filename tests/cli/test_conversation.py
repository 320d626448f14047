"""The conversation that `chat` keeps: its messages, what it forgets when the context is full, its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokenmill.cli.conversation import Conversation, Message, Turn
from tokenmill.errors import InvalidParameterError, PromptTooLongError


def count_words(messages: list[Message]) -> int:
    return sum(len(message["content"].split()) for message in messages)


def make_conversation(turns: int = 4, system: str | None = "be brief") -> Conversation:
    return Conversation(system, [Turn(f"question {index}", f"answer {index} follows") for index in range(turns)])


def test_messages_alternate_after_the_system_message() -> None:
    messages = make_conversation(2).messages("next")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[0]["content"] == "be brief"
    assert messages[-1]["content"] == "next"
    assert Conversation().messages() == []


def test_nothing_is_dropped_while_it_fits() -> None:
    conversation = make_conversation()
    assert conversation.fit("last one", count_words, 24) == (0, 24)
    assert len(conversation.turns) == 4


def test_the_oldest_turns_go_and_the_system_message_stays() -> None:
    conversation = make_conversation()
    assert conversation.fit("last one", count_words, 15) == (2, 14)
    assert [turn.question for turn in conversation.turns] == ["question 2", "question 3"]
    assert conversation.system == "be brief"


def test_a_question_that_cannot_fit_drops_nothing() -> None:
    conversation = make_conversation()
    with pytest.raises(PromptTooLongError, match=r"The question has 12 tokens .* 8 fit"):
        conversation.fit("far too many words " * 2 + "in here", count_words, 8)
    assert len(conversation.turns) == 4


def test_undo_takes_the_last_turn() -> None:
    conversation = make_conversation(2)
    assert conversation.undo() == Turn("question 1", "answer 1 follows")
    assert len(conversation.turns) == 1
    conversation.clear()
    assert conversation.undo() is None
    assert conversation.system == "be brief"


@pytest.mark.parametrize("system", [None, "sei kurz: ß"])
def test_what_is_saved_is_loaded(tmp_path: Path, system: str | None) -> None:
    conversation = make_conversation(3, system)
    conversation.remember("Was heißt »ja«?\nGenau.", "")
    conversation.save(tmp_path / "chat.json")
    assert Conversation.load(tmp_path / "chat.json") == conversation
    assert json.loads((tmp_path / "chat.json").read_text("utf-8")) == conversation.messages()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"role": "user"}', "holds no conversation"),
        ('["hello"]', "holds no conversation"),
        ('[{"role": "robot", "content": "x"}]', "holds no conversation"),
        ('[{"role": "user", "content": 3}]', "holds no conversation"),
        ('[{"role": "user", "content": "x"}]', "do not alternate"),
        ('[{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]', "do not alternate"),
        ('[{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]', "do not alternate"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "chat.json").write_text(content)
    with pytest.raises(InvalidParameterError, match=message) as caught:
        Conversation.load(tmp_path / "chat.json")
    assert caught.value.field == "file"


def test_files_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="Cannot read"):
        Conversation.load(tmp_path / "missing.json")
    with pytest.raises(InvalidParameterError, match="Cannot write"):
        Conversation().save(tmp_path / "no" / "folder.json")


def test_an_empty_list_is_an_empty_conversation(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text("[]")
    loaded: Any = Conversation.load(tmp_path / "chat.json")
    assert loaded == Conversation()
