"""`StrictJsonRoute`: endpoints whose bodies are parsed as JSON to the letter.

Python's own parser lets through what JSON does not have: NaN, and strings with half a surrogate pair, which neither a
tokenizer nor an error message can encode. It also has no limit on nesting but the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException


class StrictJsonRequest(Request):
    """A request whose `json` refuses what is not JSON."""

    async def json(self) -> Any:
        """The parsed body.

        Raises:
            HTTPException: 400, it is not valid JSON.
        """
        if not hasattr(self, "_json"):
            try:
                self._json = from_json(await self.body(), allow_inf_nan=False)
            except ValueError as error:
                raise HTTPException(400, f"The request body is not valid JSON: {error}.") from None
        return self._json


class StrictJsonRoute(APIRoute):
    """A route that hands its endpoint a `StrictJsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, called by FastAPI for each request."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictJsonRequest(request.scope, request.receive))

        return handle_strictly
