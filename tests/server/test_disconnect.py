"""A client that goes away ends its requests and frees their blocks; a request that fails says so to its client."""

from __future__ import annotations

import gc
import time
from typing import Any

import httpx
import openai
import pytest

from tests.server.live_server import LiveServer

LONG_BODY: dict[str, Any] = {"max_tokens": 3500, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "Tell me everything."}]}


def num_cancelled(server: LiveServer) -> int:
    return server.llm.stats().num_finished.get("cancelled", 0)


def wait_until_running(server: LiveServer, count: int = 1) -> None:
    deadline = time.monotonic() + 20
    while server.llm.stats().num_running < count:
        assert time.monotonic() < deadline, "the request does not start"
        time.sleep(0.005)


@pytest.mark.spec("A6")
@pytest.mark.parametrize(("path", "prompt"), [("chat/completions", CHAT), ("completions", {"prompt": "a"})])
def test_leaving_a_stream_frees_its_blocks(server: LiveServer, path: str, prompt: dict[str, Any]) -> None:
    server.wait_until_idle()
    before = num_cancelled(server)
    body = {**prompt, **LONG_BODY, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/{path}", json=body) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
        wait_until_running(server)
    server.wait_until_idle()
    assert num_cancelled(server) == before + 1


def test_leaving_through_the_official_client(server: LiveServer, client: openai.OpenAI) -> None:
    before = num_cancelled(server)
    stream = client.completions.create(
        model="tiny", prompt=["a", "b", "c"], n=2, max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    server.wait_until_idle()
    assert num_cancelled(server) == before + 3


@pytest.mark.spec("A6")
@pytest.mark.parametrize(
    ("path", "prompt", "num_requests"),
    [("chat/completions", CHAT, 1), ("completions", {"prompt": "a"}, 1), ("completions", {"prompt": ["a", "b"]}, 2)],
)
def test_leaving_before_a_whole_answer_frees_its_blocks(
    server: LiveServer, path: str, prompt: dict[str, Any], num_requests: int
) -> None:
    server.wait_until_idle()
    before = num_cancelled(server)
    body = {**prompt, **LONG_BODY, "max_tokens": 1800}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/{path}", json=body, timeout=httpx.Timeout(5, read=0.1))
    server.wait_until_idle()
    assert num_cancelled(server) == before + num_requests


def test_others_go_on_when_one_leaves(server: LiveServer, client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": "tiny", "prompt": "a stitch", "max_tokens": 60, "seed": 5}
    arguments["extra_body"] = {"ignore_eos": True}
    alone = client.completions.create(**arguments).choices[0].text
    leaving = client.completions.create(**arguments | {"max_tokens": 3000, "seed": 6, "stream": True})
    next(iter(leaving))
    staying = client.completions.create(**arguments, stream=True)
    pieces = [next(iter(staying)).choices[0].text]
    leaving.close()
    pieces += [chunk.choices[0].text for chunk in staying]
    assert "".join(pieces) == alone
    server.wait_until_idle()


def test_answer_aborted_by_the_operator(own_server: LiveServer) -> None:
    """Somebody calls `LLM.abort`: the client hears of an error, not of an answer that looks whole."""
    with own_server.client() as client:
        stream: Any = client.completions.create(
            model="tiny", prompt="a", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        for request_id in range(1, 4):
            own_server.llm.abort(request_id)
        with pytest.raises(openai.APIError) as caught:
            list(chunks)
    assert caught.value.code == "request_cancelled"
    own_server.wait_until_idle()


@pytest.mark.spec("F2")
def test_engine_that_dies_in_the_middle_of_a_stream(own_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_server.client() as client:
        streams: list[Any] = [
            client.completions.create(
                model="tiny", prompt=["a", "b"], max_tokens=900, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in range(2)
        ]
        iterators = [iter(stream) for stream in streams]
        for iterator in iterators:
            next(iterator)
        _kill_engine(own_server, monkeypatch)
        for iterator in iterators:
            with pytest.raises(openai.APIError) as caught:
                list(iterator)
            assert caught.value.code == "engine_error"
            assert caught.value.type == "server_error"
        response = httpx.get(f"{own_server.url}/health")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_error"
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="tiny", prompt="a")
        assert "tokenmill:engine_healthy{" in httpx.get(f"{own_server.url}/metrics").text


def _kill_engine(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next step fail in a way that nobody foresaw."""

    def fail() -> None:
        raise RuntimeError("the floor is gone")

    executor: Any = server.llm._executor
    monkeypatch.setattr(executor._engine, "advance", fail)


def test_leaving_is_nothing_to_log(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    """Neither asyncio nor the server complains of an exception that nobody looked at."""
    with pytest.raises(httpx.ReadTimeout):
        body = {"prompt": "a", **LONG_BODY}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.1))
    server.wait_until_idle()
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]
