"""A limit on the requests of one client: `RateLimiter` counts, `RateLimitMiddleware` refuses with 429.

A client is an address. Behind a proxy that hides addresses all clients are one; limit them there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenmill.errors import InvalidParameterError, RateLimitError
from tokenmill.server.errors import exception_body

_MAX_CLIENTS: Final = 10_000
"""Clients that are remembered before those are forgotten that could send their whole minute's requests again."""


class RateLimiter:
    """Lets a client send `requests_per_minute` at once, and then one whenever its share of the minute has passed.

    This is the generic cell rate algorithm (ITU-T I.371): one number is kept for each client, the time at which it
    would be even if its requests had come evenly.

    Args:
        requests_per_minute: of one client.
        clock: seconds.

    Raises:
        InvalidParameterError: `requests_per_minute` is not positive.
    """

    def __init__(self, requests_per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        if requests_per_minute < 1:
            raise InvalidParameterError(
                f"requests_per_minute is {requests_per_minute}.",
                field="requests_per_minute",
                remedy="Give 1 or more, or None for no limit.",
            )
        self.requests_per_minute = requests_per_minute
        self._interval = 60.0 / requests_per_minute
        self._clock = clock
        self._even_at: dict[str, float] = {}

    def take(self, client: str) -> float:
        """Count a request of `client`: 0.0 if it may pass, else the seconds until one may. What is refused is free."""
        now = self._clock()
        even_at = max(now, self._even_at.get(client, now))
        wait = even_at + self._interval - now - 60.0
        if wait > 1e-9:
            return wait
        if client not in self._even_at and len(self._even_at) >= _MAX_CLIENTS:
            self._forget(now)
        self._even_at[client] = even_at + self._interval
        return 0.0

    def _forget(self, now: float) -> None:
        self._even_at = {client: even_at for client, even_at in self._even_at.items() if even_at > now}


class RateLimitMiddleware:
    """Answers 429 to what a client sends to `/v1` by POST beyond its limit.

    Args:
        app: what is inside.
        limiter: counts.
    """

    def __init__(self, app: ASGIApp, *, limiter: RateLimiter) -> None:
        self._app = app
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse or call the application."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1"):
            await self._app(scope, receive, send)
            return
        wait = self._limiter.take(_client_of(scope))
        if not wait:
            await self._app(scope, receive, send)
            return
        seconds = max(1, math.ceil(wait))
        limit = self._limiter.requests_per_minute
        error = RateLimitError(
            f"This client may send {limit} requests a minute.", remedy=f"Try again in {seconds} s, and send fewer."
        )
        status, body = exception_body(error)
        headers = {"Retry-After": str(seconds), "X-RateLimit-Limit-Requests": str(limit)}
        await JSONResponse(body, status_code=status, headers=headers)(scope, receive, send)


def _client_of(scope: Scope) -> str:
    address = scope.get("client")
    return str(address[0]) if address else "unknown"
