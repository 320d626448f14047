"""What a client of the soak makes of a stream: whole, failed, left, or broken in some way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from benchmarks.soak_clients import MALFORMED, RequestRecord, read_events

DONE = "data: [DONE]"
ERROR = 'data: {"error": {"message": "It died.", "type": "server_error", "param": null, "code": "worker_died"}}'


def piece(text: str = "a", finish_reason: str | None = None, index: int = 0) -> str:
    choice = {"index": index, "text": text, "finish_reason": finish_reason}
    return "data: " + json.dumps({"choices": [choice]})


def read(*lines: str, **options: Any) -> RequestRecord:
    record = RequestRecord("normal", 0.0)

    async def stream() -> AsyncIterator[str]:
        for line in lines:
            yield line
            yield ""

    asyncio.run(read_events(record, stream(), **{"num_choices": 1, **options}))
    return record


def test_a_whole_answer() -> None:
    record = read(piece(), piece(), piece("", "length"), DONE)
    assert (record.outcome, record.num_terminal_events, len(record.token_times)) == ("answer", 1, 2)


def test_a_chat_answer_of_two_choices() -> None:
    def chunk(index: int, content: str, reason: str | None) -> str:
        return "data: " + json.dumps(
            {"choices": [{"index": index, "delta": {"content": content}, "finish_reason": reason}]}
        )

    lines = [chunk(0, "a", None), chunk(1, "b", None), chunk(1, "", "stop"), chunk(0, "", "length"), DONE]
    assert read(*lines, num_choices=2).outcome == "answer"
    assert read(*lines[:3], DONE, num_choices=2).outcome == "broken", "one choice never ended"


def test_an_error_is_one_end() -> None:
    record = read(piece(), ERROR)
    assert (record.outcome, record.code, record.num_terminal_events) == ("error", "worker_died", 1)


def test_leaving() -> None:
    record = read(piece(), piece(), piece(), DONE, leave_after=2)
    assert (record.outcome, record.num_terminal_events) == ("disconnected", 0)
    assert read(piece("", "stop"), DONE, leave_after=50).outcome == "answer", "it ended before"


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [piece(), piece()],
        [piece(), DONE],
        [piece("", "stop"), piece("", "stop"), DONE],
        [piece("", "stop"), DONE, DONE],
        [piece("", "stop"), DONE, piece()],
        [ERROR, DONE],
        [ERROR, ERROR],
        [DONE],
    ],
)
def test_streams_that_do_not_end_once_are_broken(lines: list[str]) -> None:
    record = read(*lines)
    assert record.outcome == "broken"
    assert record.detail


def test_malformed_bodies_differ() -> None:
    assert len({repr(body) for body in MALFORMED}) == len(MALFORMED)
