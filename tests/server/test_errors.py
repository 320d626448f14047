"""Answers that are not a success: always OpenAI's error object."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.server.live_server import LiveServer
from tests.support.tiny_checkpoint import VOCAB_SIZE
from tokenmill.errors import OutOfMemoryError, QueueFullError, RequestTooLargeError
from tokenmill.inputs import InputProcessor
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


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_allows_no_token(server: LiveServer, client: openai.OpenAI, stream: bool) -> None:
    everything = {"min_tokens": 1, "stop_token_ids": list(range(VOCAB_SIZE))}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", stream=stream, extra_body=everything)
    error = caught.value
    assert (error.type, error.param, error.code) == ("invalid_request_error", "min_tokens", "all_tokens_banned")


def test_a_request_whose_bans_leave_no_token_later(
    server: LiveServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails alone, with the same error whether it is streamed or not; the engine and other requests go on."""
    arguments: dict[str, Any] = {"model": "tiny", "prompt": "the rain", "temperature": 0.0, "max_tokens": 20}
    arguments["extra_body"] = {"ignore_eos": True}
    chunks = list(client.completions.create(**arguments, stream=True))
    whole = "".join(chunk.choices[0].text for chunk in chunks)
    output = server.llm.generate("the rain")
    first = output.outputs[0].token_ids[1]
    bad_words = [(first, last) for last in range(VOCAB_SIZE)]
    with monkeypatch.context() as patch:
        patch.setattr(InputProcessor, "_bad_words", lambda self, sampling: tuple(bad_words) if sampling.bad else ())
        banning = {**arguments, "extra_body": {"ignore_eos": True, "bad_words": ["x"]}}
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**banning)
        text = ""
        with pytest.raises(openai.APIError) as of_stream:
            for chunk in client.completions.create(**banning, stream=True):
                text += chunk.choices[0].text
        assert client.completions.create(**arguments).choices[0].text == whole, "another request of the same server"
    assert caught.value.code == of_stream.value.code == "all_tokens_banned"
    assert caught.value.type == of_stream.value.type == "invalid_request_error"
    assert text and whole.startswith(text)
    server.wait_until_idle()
    server.llm.check_health()
