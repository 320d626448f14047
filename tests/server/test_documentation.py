"""The OpenAPI document says what is really accepted, and what is really answered."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.live_server import LiveServer, live_server
from tokenmill.server.documentation import complete_schema, given, never, requires
from tokenmill.server.schemas import ChatCompletionRequest, CompletionRequest

GENERATING = ("/v1/chat/completions", "/v1/completions")


@pytest.fixture(scope="module")
def document(server: LiveServer) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/openapi.json").json())


def number(document: dict[str, Any], schema: str, field: str) -> dict[str, Any]:
    """The form of a field that is not null."""
    described = document["components"]["schemas"][schema]["properties"][field]
    [form] = [form for form in described["anyOf"] if form["type"] != "null"]
    return dict(form)


def test_ranges_are_those_that_are_checked(document: dict[str, Any]) -> None:
    chat = "ChatCompletionRequest"
    assert number(document, chat, "temperature") == {"type": "number", "minimum": 0, "maximum": 100}
    assert number(document, chat, "top_p") == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert number(document, chat, "n") == {"type": "integer", "minimum": 1, "maximum": 16}, "as many as run at a time"
    assert number(document, chat, "top_k")["minimum"] == -1, "which SamplingParams has no word for"
    assert number(document, chat, "max_tokens")["minimum"] == 1
    assert number(document, "CompletionRequest", "max_tokens")["minimum"] == 0


def test_prompts_fit_the_model(document: dict[str, Any], server: LiveServer) -> None:
    text, texts, ids, id_lists = document["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]["oneOf"]
    vocab_size = server.llm.description.model.vocab_size
    assert ids["items"]["exclusiveMaximum"] == id_lists["items"]["items"]["exclusiveMaximum"] == vocab_size
    assert text["minLength"] == texts["items"]["minLength"] == 1, "this tokenizer makes no token of no text"
    assert "x-by-model" not in httpx.get(f"{server.url}/openapi.json").text


def test_known_names_without_effect_are_described(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert set(ChatCompletionRequest.without_effect) | set(ChatCompletionRequest.unsupported) < set(fields)
    assert fields["tool_choice"]["enum"] == [None, False, "", [], {}, "none", "auto"]
    assert "Not supported" in fields["tools"]["description"]
    assert fields["user"]["description"] == "Accepted, and changes nothing."
    assert set(fields) - set(ChatCompletionRequest.unsupported) - set(ChatCompletionRequest.without_effect) == set(
        ChatCompletionRequest.model_fields
    )


@pytest.mark.parametrize("path", GENERATING)
def test_every_answer_is_described(document: dict[str, Any], path: str) -> None:
    responses = document["paths"][path]["post"]["responses"]
    assert set(responses) == {"200", "400", "404", "413", "429", "500", "503", "504"}
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    for status in ("429", "503"):
        assert "Retry-After" in responses[status]["headers"]
    for status, response in responses.items():
        if status != "200":
            assert response["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_metrics_are_text(document: dict[str, Any]) -> None:
    assert list(document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]


def test_key_is_described_where_it_is_needed(server: LiveServer, document: dict[str, Any]) -> None:
    assert "securitySchemes" not in document["components"]
    with live_server(server.llm, api_key="secret") as guarded:
        described = httpx.get(f"{guarded.url}/openapi.json").json()
    assert described["components"]["securitySchemes"]["api_key"] == {"type": "http", "scheme": "bearer"}
    operation = described["paths"]["/v1/models"]["get"]
    assert operation["security"] == [{"api_key": []}]
    assert "401" in operation["responses"]
    assert "security" not in described["paths"]["/health"]["get"]


def test_rules_between_fields() -> None:
    schema: dict[str, Any] = {"properties": {"a": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}}
    rules = (requires(given("a"), given("b", const=True)), never(given("a", const=3), given("b")))
    complete_schema(schema, rules=rules, unsupported={"c": ("x",)}, without_effect=("d",))
    assert schema["allOf"] == list(rules)
    assert schema["properties"]["c"]["enum"][-1] == "x"
    assert set(schema["properties"]) == {"a", "c", "d"}
    assert CompletionRequest.rules
    assert CompletionRequest.model_json_schema()["allOf"] == list(CompletionRequest.rules)
