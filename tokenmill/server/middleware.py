"""What every request passes before an endpoint sees it: a counter, the API key, the limit on the body's size."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenmill.server.errors import error_body
from tokenmill.telemetry.process_metrics import HttpOutcomes


class CountingMiddleware:
    """Counts every request by its outcome.

    Args:
        app: what is inside.
        outcomes: counts.
        methods: that are counted under their name; others are counted as `other`, as routes are that do not exist.
    """

    def __init__(self, app: ASGIApp, *, outcomes: HttpOutcomes, methods: frozenset[str]) -> None:
        self._app = app
        self._outcomes = outcomes
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application and look at the status that it sends."""
        if scope["type"] != "http" or scope["path"] == "/metrics":  # looking at the numbers does not change them
            await self._app(scope, receive, send)
            return
        status = 499

        async def watching_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watching_send)
        except Exception:  # the web framework answers it outside of all middleware
            status = 500 if status == 499 else status
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in self._methods else "other"
            self._outcomes.count(method, route, status)


class ApiKeyMiddleware:
    """Lets requests below `/v1` pass only with `Authorization: Bearer <api_key>`; health and metrics stay open."""

    def __init__(self, app: ASGIApp, *, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or call the application."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1"):
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
            return
        problem = "Incorrect API key provided." if given else "You didn't provide an API key."
        remedy = "Send it in the header 'Authorization: Bearer <key>'."
        body = error_body(f"{problem} {remedy}", 401, code="invalid_api_key")
        await JSONResponse(body, status_code=401, headers={"WWW-Authenticate": "Bearer"})(scope, receive, send)


class BodyLimitMiddleware:
    """Refuses bodies above `max_bytes` with 413, at the latest when that many bytes have been read."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application with a `receive` that counts."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        num_bytes = 0

        async def counting_receive() -> Message:
            nonlocal num_bytes
            if declared.isdecimal() and int(declared) > self._max_bytes:
                raise self._too_large()
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, counting_receive, send)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The request body is larger than {self._max_bytes} bytes.")
