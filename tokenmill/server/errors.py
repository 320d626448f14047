"""Every answer that is not a success, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

`install_error_handlers` covers tokenmill's own errors, malformed bodies, unknown routes and unexpected exceptions;
`error_body` is also what a failing stream sends as its last event. No traceback reaches a client.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tokenmill.errors import TokenmillError
from tokenmill.server.backpressure import Backpressure

logger = logging.getLogger(__name__)

_MAX_MESSAGE_LEN = 2000
_STATUS_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_STATUS_CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


def error_body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object. Text that cannot be encoded as UTF-8 is escaped, a very long message is cut."""
    if len(message) > _MAX_MESSAGE_LEN:
        message = message[:_MAX_MESSAGE_LEN] + " ..."
    kind = _STATUS_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": _encodable(message), "type": kind, "param": _encodable(param), "code": code}}


def exception_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and error object for any exception; what is not tokenmill's own shows the client no detail."""
    if isinstance(error, TokenmillError):
        return error.http_status, error_body(str(error), error.http_status, param=error.field, code=error.code)
    return 500, error_body("The server failed to answer this request.", 500, code="internal_error")


def install_error_handlers(app: FastAPI, backpressure: Backpressure) -> None:
    """Answer every error of `app` in OpenAI's shape; `backpressure` says when a refused client may come back."""

    async def answer_error(request: Request, error: Exception) -> JSONResponse:
        return _answer_error(request, error, backpressure)

    app.add_exception_handler(TokenmillError, answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid_request)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, answer_error)


def _answer_error(request: Request, error: Exception, backpressure: Backpressure) -> JSONResponse:
    status, body = exception_body(error)
    if status >= 500 and isinstance(error, TokenmillError):  # the web framework logs the others
        logger.error("%s %s failed: %s", request.method, request.url.path, error)
    headers = {}
    if status == 429:
        headers["Retry-After"] = str(backpressure.refuse())
    elif status == 503:
        headers["Retry-After"] = "1"
    return JSONResponse(body, status_code=status, headers=headers)


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = error.status_code
    message = str(error.detail)
    if status == 404:
        message = f"Unknown request URL: {request.method} {request.url.path}. GET / lists the endpoints."
    elif status == 405:
        message = f"{request.method} is not allowed for {request.url.path}."
    body = error_body(message, status, code=_STATUS_CODES.get(status))
    return JSONResponse(body, status_code=status, headers=error.headers)


async def _answer_invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["loc"][0] != "body":
        name = str(first["loc"][-1])
        text = f"Invalid {first['loc'][0]} parameter '{name}': {first['msg']}."
        return JSONResponse(error_body(text, 400, param=name, code="invalid_parameter"), status_code=400)
    cause = first.get("ctx", {}).get("error")
    param = parameter_path(first["loc"], error.body)
    if isinstance(cause, TokenmillError):
        if param is not None and cause.field is not None:
            param = f"{param}.{cause.field}"
        body = error_body(str(cause), cause.http_status, param=param or cause.field, code=cause.code)
    elif param is None:
        message = "The request body must be a JSON object, sent with 'Content-Type: application/json'."
        body = error_body(message, 400, code="invalid_json")
    elif first["type"] == "missing":
        body = error_body(
            f"Missing required parameter: '{param}'.", 400, param=param, code="missing_required_parameter"
        )
    else:
        body = error_body(f"Invalid '{param}': {first['msg']}.", 400, param=param, code="invalid_parameter")
    return JSONResponse(body, status_code=400)


def parameter_path(location: Sequence[str | int], body: Any) -> str | None:
    """The field at fault as a client would write it, e.g. `messages[0].content`; None for the whole body.

    Args:
        location: where validation failed, as pydantic tells it: `body`, then keys and indices, with the names of union
            members strewn in. Only the steps that can be walked in `body` are kept, and a last key that it lacks.
    """
    path = ""
    node = body
    for position, step in enumerate(location[1:], start=1):
        if isinstance(step, int):
            if not isinstance(node, list) or step >= len(node):
                continue
            node = node[step]
            path += f"[{step}]"
        elif isinstance(node, Mapping) and (step in node or position == len(location) - 1):
            node = node.get(step)
            path += f".{step}" if path else step
    return path or None


def _encodable(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")
