"""The slash commands of `tokenmill chat`: a table from name to function, and their `/help`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.cli.console import print_note
from tokenmill.cli.conversation import Conversation
from tokenmill.cli.options import checked_sampling
from tokenmill.errors import InvalidParameterError, UnknownParameterError, did_you_mean

if TYPE_CHECKING:
    from tokenmill.cli.chat import ChatSession


@dataclass(frozen=True, slots=True)
class SlashCommand:
    """One command: what follows its name in `/help`, what it does, and the function that does it."""

    usage: str
    purpose: str
    run: Callable[[ChatSession, str], None]


def run_slash_command(session: ChatSession, line: str) -> None:
    """Run `line`, which starts with a slash.

    Raises:
        UserError: no such command, or it cannot do what it was asked.
    """
    name, _, argument = line[1:].partition(" ")
    commands = slash_commands()
    if name not in commands:
        raise UnknownParameterError(f"There is no command /{name}.", remedy=did_you_mean(name, commands))
    commands[name].run(session, argument.strip())


def slash_commands() -> dict[str, SlashCommand]:
    """Every command by name, in the order of `/help`."""
    return {
        "help": SlashCommand("", "this list", _help),
        "clear": SlashCommand("", "forget the conversation", _clear),
        "system": SlashCommand(
            "[TEXT]", "set the system message; show it without TEXT; /system none removes it", _system
        ),
        "undo": SlashCommand("", "take back the last question and its answer", _undo),
        "retry": SlashCommand("", "ask the last question again", _retry),
        "params": SlashCommand("[NAME=VALUE ...]", "set sampling parameters (none resets), or show them", _params),
        "save": SlashCommand("FILE", "write the conversation to a JSON file", _save),
        "load": SlashCommand("FILE", "go on with a saved conversation", _load),
        "stats": SlashCommand("", "speed of the last answer, state of the engine", _stats),
        "exit": SlashCommand("", "leave (also Ctrl-D, and Ctrl-C on an empty line)", _exit),
    }


def _help(session: ChatSession, argument: str) -> None:
    commands = slash_commands()
    width = max(len(f"/{name} {command.usage}") for name, command in commands.items())
    for name, command in commands.items():
        print_note(f"{f'/{name} {command.usage}':<{width}}  {command.purpose}")
    print_note("A backslash at the end of a line goes on in the next one. Ctrl-C stops an answer. // sends a slash.")


def _clear(session: ChatSession, argument: str) -> None:
    session.conversation.clear()
    print_note("The conversation is empty.")


def _system(session: ChatSession, argument: str) -> None:
    if argument:
        session.conversation.system = None if argument == "none" else argument
    print_note(f"System message: {session.conversation.system or 'none'}")


def _undo(session: ChatSession, argument: str) -> None:
    turn = session.conversation.undo()
    print_note("There is nothing to take back." if turn is None else f"Taken back: {_shortened(turn.question)}")


def _retry(session: ChatSession, argument: str) -> None:
    turn = session.conversation.undo()
    if turn is None:
        print_note("There is nothing to ask again.")
        return
    try:
        answered = session.ask(turn.question)
    except BaseException:
        session.conversation.turns.append(turn)
        raise
    if not answered:
        session.conversation.turns.append(turn)


def _params(session: ChatSession, argument: str) -> None:
    values: dict[str, Any] = dict(session.sampling)
    for assignment in _words(argument):
        name, equals, text = assignment.partition("=")
        if not equals:
            raise InvalidParameterError(
                f"'{assignment}' is no assignment.", field=name, remedy="Write /params temperature=0.8 top_p=0.9."
            )
        values[name] = _parsed(text)
    checked = checked_sampling(values)
    session.sampling = {name: getattr(checked, name) for name, value in values.items() if value is not None}
    described = ", ".join(f"{name}={value!r}" for name, value in session.sampling.items())
    print_note(f"Sampling: {described or 'defaults'}{' (greedy)' if checked.greedy else ''}")


def _parsed(text: str) -> Any:
    """`text` as a JSON value (number, true, list); `none` is None; anything else is the text itself."""
    if text.lower() == "none":
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _save(session: ChatSession, argument: str) -> None:
    path = _path(argument, "save")
    session.conversation.save(path)
    print_note(f"Saved {_turns(session.conversation)} to {path}.")


def _load(session: ChatSession, argument: str) -> None:
    path = _path(argument, "load")
    session.conversation = Conversation.load(path)
    print_note(f"Loaded {_turns(session.conversation)} from {path}.")


def _stats(session: ChatSession, argument: str) -> None:
    print_note(f"Last answer: {'none yet' if session.last_answer is None else session.last_answer.summary()}")
    stats = session.llm.stats()
    cache = stats.kv_cache
    print_note(f"Engine: {stats.num_steps} steps, {stats.num_generated_tokens} tokens generated")
    print_note(
        f"KV cache: {cache.num_blocks - cache.num_free_blocks} of {cache.num_blocks} blocks in use, "
        f"{cache.num_cached_blocks} cached, {cache.hit_rate:.0%} of prompt tokens found"
    )


def _exit(session: ChatSession, argument: str) -> None:
    session.running = False


def _path(argument: str, command: str) -> Path:
    words = _words(argument)
    if len(words) != 1:
        raise InvalidParameterError(f"/{command} takes one file.", field="file", remedy=f"Write /{command} chat.json.")
    return Path(words[0]).expanduser()


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InvalidParameterError(f"{text!r} cannot be read: {error}.", remedy="Close the quotation mark.") from None


def _turns(conversation: Conversation) -> str:
    count = len(conversation.turns)
    return f"{count} turn{'' if count == 1 else 's'}"


def _shortened(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
