"""Checks chat messages and turns them into the plain data that a chat template sees.

Messages come from callers and HTTP bodies in OpenAI's shape: dicts with a role and a content that is a string or a list
of parts. Every fault is an `InvalidParameterError` whose text names the index of the message. Used by `ChatTemplate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenmill.errors import InvalidParameterError

_MAX_DEPTH = 64
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A deep, plain copy of `messages` as templates expect them.

    Keys whose value is None are dropped, since most templates would print "None". Reasoning goes by the name
    `reasoning_content`, whatever its name was. Tool call arguments that are JSON text become objects: templates write
    them with `tojson`, which would quote text a second time.

    Raises:
        InvalidParameterError: no messages, or a malformed one; the text names its index.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise _invalid(f"messages must be a list of messages, got {type(messages).__name__}.")
    if not messages:
        raise _invalid("messages is empty.", remedy="Give at least one message.")
    return [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def plain_data(value: Any, where: str, field: str, depth: int = 0) -> Any:
    """`value` rebuilt from dict, list, str, int, float, bool and None alone, so that a template finds no methods.

    Raises:
        InvalidParameterError: something in it is of another type, or nested too deeply.
    """
    if depth > _MAX_DEPTH:
        raise InvalidParameterError(f"{where} is nested more than {_MAX_DEPTH} deep.", field=field)
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # a subclass, for example a StrEnum
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): plain_data(item, f"{where}.{key}", field, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item, f"{where}[{index}]", field, depth + 1) for index, item in enumerate(value)]
    raise InvalidParameterError(
        f"{where} is a {type(value).__name__}; templates take only text, numbers, lists and dicts.", field=field
    )


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """A plain copy of the tools' JSON schemas; None when there are none.

    Raises:
        InvalidParameterError: a tool is not a dict.
    """
    if not tools:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise InvalidParameterError(f"tools must be a list of JSON schemas, got {type(tools).__name__}.", field="tools")
    checked: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidParameterError(
                f"tools[{index}] is a {type(tool).__name__}, not a dict.",
                field="tools",
                remedy="Describe the function by its JSON schema.",
            )
        checked.append(plain_data(tool, f"tools[{index}]", "tools"))
    return checked


def flatten_content(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with lists of text parts joined by newlines, for templates that take only strings."""
    return [
        {**message, "content": "\n".join(part["text"] for part in message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _check_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _invalid(f"{where} is a {type(message).__name__}, not a dict with 'role' and 'content'.")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise _invalid(
            f"{where} has no role." if role is None else f"{where}.role must be a non-empty string, got {role!r}.",
            remedy="Give each message a role: 'system', 'user', 'assistant' or 'tool'.",
        )
    checked: dict[str, Any] = {}
    for key, value in message.items():
        if key == "content" and value is not None:
            checked[key] = _check_content(value, f"{where}.content")
        elif key == "tool_calls" and value is not None:
            checked[key] = _check_tool_calls(value, f"{where}.tool_calls")
        elif value is not None:
            checked[str(key)] = plain_data(value, f"{where}.{key}", "messages")
    reasoning = _reasoning(checked)
    if "content" not in checked and (role != "assistant" or ("tool_calls" not in checked and reasoning is None)):
        raise _invalid(f"{where} has no content.", remedy="Only an assistant's message with tool calls may lack it.")
    if reasoning is not None:
        checked = {"thinking": reasoning, **checked, "reasoning_content": reasoning}
    return checked


def _reasoning(message: dict[str, Any]) -> Any:
    return next((message[key] for key in _REASONING_KEYS if message.get(key) is not None), None)


def _check_content(content: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return str.__str__(content)
    if not isinstance(content, (list, tuple)):
        raise _invalid(f"{where} must be a string or a list of parts, got {type(content).__name__}.")
    if not content:
        raise _invalid(f"{where} is an empty list.", remedy="Give a string or at least one part.")
    parts: list[dict[str, Any]] = []
    for index, part in enumerate(content):
        if not isinstance(part, Mapping):
            raise _invalid(
                f"{where}[{index}] is a {type(part).__name__}, not a dict.",
                remedy='Write it as {"type": "text", "text": ...}.',
            )
        if part.get("type") != "text":
            raise _invalid(
                f"{where}[{index}] has the unknown type {part.get('type')!r}.",
                remedy='Only {"type": "text", "text": ...} is supported.',
            )
        if not isinstance(part.get("text"), str):
            raise _invalid(f"{where}[{index}].text must be a string, got {type(part.get('text')).__name__}.")
        parts.append(plain_data(part, f"{where}[{index}]", "messages"))
    return parts


def _check_tool_calls(tool_calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(tool_calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in tool_calls):
        raise _invalid(f"{where} must be a list of dicts.")
    checked: list[dict[str, Any]] = plain_data(tool_calls, where, "messages")
    for call in checked:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _parsed_arguments(function["arguments"])
    return checked


def _parsed_arguments(arguments: str) -> Any:
    """The object that `arguments` describes; the text itself when it describes none (models write broken JSON too)."""
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _invalid(message: str, *, remedy: str | None = None) -> InvalidParameterError:
    return InvalidParameterError(message, field="messages", remedy=remedy)
