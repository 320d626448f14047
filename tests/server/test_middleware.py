"""API keys and the limit on bodies, over a socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.server.live_server import LiveServer, live_server
from tokenmill.server.app import MAX_BODY_BYTES

KEY = "correct horse"


@pytest.fixture(scope="module")
def locked_server(server: LiveServer) -> Iterator[LiveServer]:
    with live_server(server.llm, served_model_name="tiny", api_key=KEY) as locked:
        yield locked


def test_right_key_passes(locked_server: LiveServer) -> None:
    with locked_server.client(KEY) as client:
        assert client.models.list().data[0].id == "tiny"
        assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices


@pytest.mark.parametrize("key", ["wrong", "correct horses", "correct hors", "ü"])
def test_wrong_key_is_refused(locked_server: LiveServer, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}".encode()}
    response = httpx.post(f"{locked_server.url}/v1/completions", json={"prompt": "a"}, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert KEY not in response.text


def test_official_client_raises_its_error(locked_server: LiveServer) -> None:
    with locked_server.client("wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_missing_key_is_refused(locked_server: LiveServer) -> None:
    response = httpx.get(f"{locked_server.url}/v1/models")
    assert response.status_code == 401
    assert "didn't provide" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/health", "/version", "/metrics", "/docs"])
def test_operators_need_no_key(locked_server: LiveServer, path: str) -> None:
    assert httpx.get(f"{locked_server.url}{path}").status_code == 200


def test_body_declared_too_large(server: LiveServer) -> None:
    address = urlsplit(server.url)
    assert address.hostname is not None
    with closing(HTTPConnection(address.hostname, address.port, timeout=20)) as connection:
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(MAX_BODY_BYTES + 1))
        connection.endheaders(b"{")
        response = connection.getresponse()
        assert response.status == 413
        assert json.loads(response.read())["error"]["code"] == "request_too_large"


def test_body_that_does_not_say_how_large_it_is(server: LiveServer) -> None:
    piece = b" " * 2**20

    def pieces() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // len(piece) + 1):
            yield piece

    try:
        response = httpx.post(
            f"{server.url}/v1/completions", content=pieces(), headers={"Content-Type": "application/json"}
        )
    except (httpx.WriteError, httpx.RemoteProtocolError):
        return  # the server closed the connection before everything was sent
    assert response.status_code == 413
