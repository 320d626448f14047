"""What the OpenAPI document says beyond types: ranges, rules between fields, known names that do nothing, every error.

`schemas.py` calls `complete_schema` for each request schema; `app.py` builds its document with `describe_api`. Clients
are generated from this document and fuzzers derive requests from it, so it describes what is really accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from tokenmill.sampling_params import SamplingParams
from tokenmill.server.health_report import UnhealthyReport
from tokenmill.server.responses import ErrorResponse

Schema = dict[str, Any]

BY_MODEL = "x-by-model"
"""Keyword of schemas that depend on the model; `describe_api` puts what holds for the served model in its place."""

_RANGE_KEYWORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_RETRY_AFTER: Schema = {
    "Retry-After": {
        "description": "Seconds after which another try makes sense.",
        "schema": {"type": "integer", "minimum": 1},
    }
}


def _error(description: str, **other: Any) -> Schema:
    return {"model": ErrorResponse, "description": description, **other}


ANY_ROUTE_ERRORS: dict[int | str, Schema] = {500: _error("The server failed; the error says nothing of the inside.")}
"""For every endpoint."""

GENERATION_ERRORS: dict[int | str, Schema] = {
    400: _error("The request is wrong; `param` names the field."),
    404: _error("No such model."),
    413: _error("The body is too large."),
    429: _error("Too many requests wait, or this client sends too many; try again later.", headers=_RETRY_AFTER),
    **ANY_ROUTE_ERRORS,
    503: _error("The engine does not run, or has not enough memory.", headers=_RETRY_AFTER),
    504: _error("The request's `timeout` passed before its answer was complete."),
}
"""For endpoints that generate. An error after the first piece of a stream is an event with the same object."""

BAD_QUERY: dict[int | str, Schema] = {400: _error("A query parameter is wrong; `param` names it.")}
"""For endpoints with query parameters."""

UNHEALTHY: dict[int | str, Schema] = {
    **ANY_ROUTE_ERRORS,
    503: {"model": UnhealthyReport, "description": "It is not well; the error has the reason."},
}
"""For `/health`."""

UNAVAILABLE: dict[int | str, Schema] = {**ANY_ROUTE_ERRORS, 503: _error("It is not so; the error has the reason.")}
"""For endpoints that say whether something is so."""


def event_stream(whole: type[Any], event: str) -> dict[int | str, Schema]:
    """The two forms of a successful answer: `whole` as JSON, or events that each hold an `event` object."""
    text = f"With `stream`: server-sent events, each with a `{event}` object as its data, and `[DONE]` as the last."
    schema = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", "description": text}}}
    content = {"text/event-stream": {"schema": schema}}
    return {200: {"model": whole, "description": f"The answer. {text}", "content": content}}


# ---- request schemas -------------------------------------------------------------------------------------------------


def given(name: str, **schema: Any) -> Schema:
    """Holds for objects in which `name` is there, is not null, and satisfies `schema`."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}, **schema}}}


def requires(condition: Schema, consequence: Schema) -> Schema:
    """Objects that satisfy `condition` have to satisfy `consequence`."""
    return {"if": condition, "then": consequence}


def never(*conditions: Schema) -> Schema:
    """No object may satisfy all `conditions`."""
    return {"not": {"allOf": list(conditions)}}


def complete_schema(
    schema: Schema,
    *,
    rules: Iterable[Schema],
    unsupported: dict[str, tuple[Any, ...]],
    without_effect: Iterable[str],
) -> None:
    """Add to a request's JSON schema what its types do not say.

    Args:
        schema: changed in place.
        rules: schemas that the whole object has to satisfy besides.
        unsupported: names that are accepted only with null, false, something empty, or one of the values given.
        without_effect: names that are accepted with any value.
    """
    properties: dict[str, Schema] = schema["properties"]
    ranges = SamplingParams.model_json_schema()["properties"]
    for name, described in properties.items():
        if name in ranges:
            _copy_range(ranges[name], described)
    for name in sorted(without_effect):
        properties.setdefault(name, {"description": "Accepted, and changes nothing."})
    for name, values in sorted(unsupported.items()):
        neutral = [None, False, "", [], {}, *values]
        properties.setdefault(
            name, {"description": "Not supported: only values that ask for nothing.", "enum": neutral}
        )
    if every := list(rules):
        schema["allOf"] = every


def _copy_range(source: Schema, target: Schema) -> None:
    """Give the numbers that `target` describes the range of those in `source`, unless it has its own."""
    found = next((form for form in source.get("anyOf", [source]) if form.get("type") in ("integer", "number")), None)
    if found is None:
        return
    for form in target.get("anyOf", [target]):
        if form.get("type") == found["type"] and not any(keyword in form for keyword in _RANGE_KEYWORDS):
            form.update({keyword: found[keyword] for keyword in _RANGE_KEYWORDS if keyword in found})


# ---- the document ----------------------------------------------------------------------------------------------------


def describe_api(app: FastAPI, *, needs_key: bool, by_model: Mapping[str, Schema]) -> Schema:
    """The OpenAPI document of `app`.

    Args:
        app: with all its routes.
        needs_key: whether endpoints below `/v1` want an API key.
        by_model: keywords for schemas that are marked with `BY_MODEL`, by the mark's value.
    """
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own errors, which this server never sends
        schemas.pop(name, None)
    _fill_in(schemas, by_model)
    if needs_key:
        document["components"]["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if needs_key and path.startswith("/v1"):
                operation["security"] = [{"api_key": []}]
                operation["responses"]["401"] = _reference(_error("No API key, or a wrong one."))
    return document


def _fill_in(node: Any, by_model: Mapping[str, Schema]) -> None:
    """Complete every schema below `node` that is marked with `BY_MODEL`."""
    if isinstance(node, dict):
        node.update(by_model.get(node.pop(BY_MODEL, ""), {}))
        node = list(node.values())
    for inner in node if isinstance(node, list) else ():
        _fill_in(inner, by_model)


def _reference(response: Schema) -> Schema:
    """A response as the document writes it."""
    schema = {"$ref": f"#/components/schemas/{response['model'].__name__}"}
    return {"description": response["description"], "content": {"application/json": {"schema": schema}}}
