"""The `timeout` of a request: when it passes, the request ends with an error and its blocks are free."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.live_server import LiveServer

BODIES: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "a"},
    "chat/completions": {"messages": [{"role": "user", "content": "Tell me everything."}]},
}
ENDLESS = {"max_tokens": 3900, "ignore_eos": True, "timeout": 0.2}


def post(server: LiveServer, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json={**BODIES[path], **fields}, timeout=60)


@pytest.mark.spec("F3")
@pytest.mark.parametrize("path", list(BODIES))
def test_a_whole_answer_that_comes_too_late_is_504(server: LiveServer, path: str) -> None:
    before = server.llm.stats().num_finished.get("request_timeout", 0)
    response = post(server, path, **ENDLESS)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "request_timeout"
    server.wait_until_idle()
    assert server.llm.stats().num_finished["request_timeout"] == before + 1


@pytest.mark.parametrize("path", list(BODIES))
def test_a_stream_ends_with_the_error(server: LiveServer, path: str) -> None:
    response = post(server, path, **ENDLESS, stream=True)
    assert response.status_code == 200
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert len(events) > 2, "what came in time was sent"
    assert json.loads(events[-1])["error"]["code"] == "request_timeout"
    assert "[DONE]" not in events
    server.wait_until_idle()


def test_an_answer_in_time_is_whole(server: LiveServer) -> None:
    response = post(server, "completions", max_tokens=3, timeout=30)
    assert response.status_code == 200


@pytest.mark.parametrize("value", [0, -1, 1e9, "2", True])
def test_timeouts_out_of_range_are_named(server: LiveServer, value: Any) -> None:
    response = post(server, "completions", timeout=value)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "timeout"
