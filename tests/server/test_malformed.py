"""No body, however malformed, makes the server fail: random JSON is answered with 200 or 4xx, and the engine lives."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.live_server import LiveServer
from tokenmill.server.schemas import ChatCompletionRequest, CompletionRequest

numbers = st.one_of(
    st.integers(-3, 4),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
)
texts = st.text(st.characters(codec=None), max_size=8)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
# Two limits on the length, so that no random value of one of them makes a long answer.
BODIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "chat/completions": (
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "max_completion_tokens": 2},
        sorted({*ChatCompletionRequest.model_fields, *ChatCompletionRequest.unsupported}),
    ),
    "completions": (
        {"prompt": "a", "max_tokens": 2},
        sorted({*CompletionRequest.model_fields, *CompletionRequest.unsupported}),
    ),
}
message = st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls"]), anything)
fuzzing = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def http(server: LiveServer) -> Any:
    with httpx.Client(base_url=f"{server.url}/v1", timeout=60) as client:
        yield client
    server.wait_until_idle()
    server.llm.check_health()


def post(http: httpx.Client, path: str, body: Any) -> httpx.Response:
    content = json.dumps(body).encode()
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n"), response.text
    return response


@pytest.mark.spec("H2")
@pytest.mark.parametrize("path", list(BODIES))
@fuzzing
@given(data=st.data())
def test_random_values_in_one_field(http: httpx.Client, path: str, data: st.DataObject) -> None:
    body, fields = BODIES[path]
    field = data.draw(st.sampled_from(fields))
    value = data.draw(anything)
    if field in ("max_tokens", "max_completion_tokens") and isinstance(value, int) and value > 2:
        value = -value
    response = post(http, path, {**body, field: value})
    param = response.json()["error"]["param"] if response.status_code == 400 else None
    if param is not None:
        assert param.startswith((field, "n", "best_of", "top_logprobs")), response.text


@pytest.mark.spec("H2")
@pytest.mark.parametrize("path", list(BODIES))
@fuzzing
@given(data=st.data())
def test_random_values_in_several_fields(http: httpx.Client, path: str, data: st.DataObject) -> None:
    body, fields = BODIES[path]
    lengths = {"max_tokens", "max_completion_tokens", "n", "best_of"}
    plausible = st.one_of(st.none(), st.booleans(), st.integers(-1, 3), st.floats(0, 2), texts, st.lists(texts))
    others = data.draw(st.dictionaries(st.sampled_from([f for f in fields if f not in lengths]), plausible, max_size=4))
    post(http, path, body | others)


@pytest.mark.spec("H2")
@fuzzing
@given(body=anything, path=st.sampled_from(list(BODIES)))
def test_random_bodies(http: httpx.Client, path: str, body: Any) -> None:
    assert post(http, path, body).status_code == 400


@pytest.mark.spec("H2")
@fuzzing
@given(content=st.binary(max_size=64), path=st.sampled_from(list(BODIES)))
def test_random_bytes(http: httpx.Client, path: str, content: bytes) -> None:
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400


@pytest.mark.spec("H2")
@fuzzing
@given(messages=st.lists(message, max_size=3))
def test_random_messages(http: httpx.Client, messages: Any) -> None:
    post(http, "chat/completions", {"messages": messages, "max_tokens": 1})


@pytest.mark.spec("H2")
@fuzzing
@given(text=st.text(st.characters(codec=None), max_size=30), stream=st.booleans())
def test_random_text(http: httpx.Client, text: str, stream: bool) -> None:
    message = {"role": "user", "content": text}
    response = post(http, "chat/completions", {"messages": [message], "max_tokens": 1, "stream": stream})
    is_text = not any(0xD800 <= ord(character) <= 0xDFFF for character in text)
    assert response.status_code == (200 if is_text else 400)
