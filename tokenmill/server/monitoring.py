"""What operators ask: `/` (what is this), `/health`, `/version`, `/metrics`. None of them needs the API key."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from tokenmill.errors import TokenmillError
from tokenmill.server.documentation import ANY_ROUTE_ERRORS, UNAVAILABLE
from tokenmill.server.errors import error_body
from tokenmill.server.state import State
from tokenmill.version import __version__

router = APIRouter(tags=["Operation"])


@router.get("/")
async def describe(request: Request, state: State) -> JSONResponse:
    """Say what this is and list the endpoints."""
    endpoints = {
        path: sorted(method.upper() for method in methods) for path, methods in request.app.openapi()["paths"].items()
    }
    return JSONResponse(
        {
            "name": "tokenmill",
            "version": __version__,
            "model": state.model_name,
            "documentation": "/docs",
            "endpoints": endpoints,
        }
    )


@router.get("/health", responses=UNAVAILABLE)
async def check_health(state: State) -> JSONResponse:
    """200 while the engine runs; else 503 with the reason."""
    try:
        state.llm.check_health()
    except TokenmillError as error:
        return JSONResponse(error_body(str(error), 503, code=error.code), status_code=503)
    return JSONResponse({"status": "ok"})


@router.get("/version")
async def show_version() -> JSONResponse:
    """The version of tokenmill."""
    return JSONResponse({"version": __version__})


@router.get("/metrics", response_class=PlainTextResponse, responses=ANY_ROUTE_ERRORS)
async def show_metrics(request: Request, state: State) -> Response:
    """Metrics in Prometheus' text format."""
    content, content_type = state.metrics.render(request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": content_type})
