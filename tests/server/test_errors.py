"""Answers that are not a success: always OpenAI's error object."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.server.live_server import LiveServer
from tokenmill.errors import OutOfMemoryError, QueueFullError, RequestTooLargeError
from tokenmill.server.backpressure import Backpressure
from tokenmill.server.errors import error_body, exception_body, install_error_handlers, parameter_path


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object; checks its shape."""
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"]
    return dict(body["error"])


@pytest.mark.parametrize("path", ["/nowhere", "/v1/embeddings", "/v1/chat"])
def test_unknown_route(server: LiveServer, path: str) -> None:
    response = httpx.post(f"{server.url}{path}", json={})
    assert response.status_code == 404
    assert path in error_of(response)["message"]


def test_wrong_method(server: LiveServer) -> None:
    response = httpx.get(f"{server.url}/v1/chat/completions")
    assert response.status_code == 405
    assert error_of(response)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"{]",
        b"\xff\xfe\x00",
        b'{"prompt": NaNN}',
        b'{"prompt": "a", "seed": ' + b"9" * 10000 + b"}",
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"messages": [{"role": "user", "content": "\\udfff"}]}',
        b'{"\\ud800": 1}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "logit_bias": {"1": -Infinity}}',
    ],
)
def test_malformed_body(server: LiveServer, path: str, content: bytes) -> None:
    response = httpx.post(f"{server.url}{path}", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_body_of_another_type(server: LiveServer, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 400
    assert "Content-Type: application/json" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("location", "path"),
    [
        (("body",), None),
        (("body", "prompt"), "prompt"),
        (("body", "missing"), "missing"),
        (("body", "messages", 1, "content", "list[part]", 0, "text"), "messages[1].content[0].text"),
        (("body", "stop", "list", 1), "stop[1]"),
        (("body", "messages", 0, "content"), "messages[0].content"),
        (("body", 17), None),
    ],
)
def test_parameter_path(location: tuple[str | int, ...], path: str | None) -> None:
    body = {"prompt": 1, "stop": ["a", 2], "messages": [{}, {"content": [{"type": "text"}]}]}
    assert parameter_path(location, body) == path


def test_tokenmill_errors_keep_status_code_and_field() -> None:
    status, body = exception_body(RequestTooLargeError("Too large.", field="max_tokens", remedy="Lower it."))
    assert status == 400
    assert body["error"] == {
        "message": "Too large. Lower it.",
        "type": "invalid_request_error",
        "param": "max_tokens",
        "code": "request_too_large",
    }
    assert exception_body(OutOfMemoryError("Full."))[0] == 503
    status, body = exception_body(QueueFullError("Full."))
    assert (status, body["error"]["type"]) == (429, "rate_limit_error")


def test_message_is_cut_and_can_be_encoded() -> None:
    error = error_body("\ud800" + "x" * 10_000, 400, param="\udfff")["error"]
    assert len(error["message"]) < 2100
    json.dumps(error, ensure_ascii=False).encode("utf-8")


def test_unexpected_exception_shows_no_detail(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    install_error_handlers(app, Backpressure(lambda: 0))

    @app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError("secret")

    @app.get("/full")
    async def full() -> None:
        raise QueueFullError("Full.")

    client = TestClient(app, raise_server_exceptions=False)
    response = client.get("/broken")
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text
    response = client.get("/full")
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
