"""What operators ask: `/` (what is this), `/health`, `/health/generate`, `/ready`, `/version`, `/metrics`.

None of them needs the API key, and none changes anything that another one shows.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from tokenmill.errors import TokenmillError
from tokenmill.server.documentation import ANY_ROUTE_ERRORS, BAD_QUERY, UNAVAILABLE, UNHEALTHY
from tokenmill.server.errors import error_body
from tokenmill.server.health_report import HealthReport, Status
from tokenmill.server.state import State
from tokenmill.version import __version__

PROBE_SECONDS = 5.0
MAX_PROBE_SECONDS = 60.0
"""How long `/health/generate` waits for a token, unless it is told otherwise; and the longest that it can be told."""

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


@router.get("/health", response_model=None, responses={200: {"model": HealthReport}, **UNHEALTHY})
async def check_health(state: State) -> JSONResponse:
    """200 while every engine lives and makes progress with the work that it has; else 503 with the reason.

    An engine that is dead, stopped or stuck is reported within 2 seconds; one whose steps take longer than that within
    twice the time of its longest step. `degraded` (some engines work, others do not) is also 503.
    """
    health = state.llm.health()
    report = HealthReport.of(health)
    if health.state == "healthy":
        return JSONResponse(report.model_dump())
    code = "degraded"
    try:
        state.llm.check_health()
    except TokenmillError as error:
        code = error.code
    body = error_body(health.message or "No request can be run.", 503, code=code)
    return JSONResponse({**body, **report.model_dump()}, status_code=503)


@router.get("/health/generate", response_model=None, responses={200: {"model": Status}, **BAD_QUERY, **UNAVAILABLE})
async def check_generation(
    state: State, timeout: Annotated[float, Query(gt=0, le=MAX_PROBE_SECONDS)] = PROBE_SECONDS
) -> JSONResponse:
    """200 when a token came out of the engine while this was asked; 503 if none came within `timeout` seconds.

    An idle engine runs a request of one token for it. Probes at the same time share one.
    """
    try:
        await state.probe.run(timeout)
    except TokenmillError as error:
        return _unavailable(error)
    return JSONResponse({"status": "ok"})


@router.get("/ready", response_model=None, responses={200: {"model": Status}, **UNAVAILABLE})
async def check_ready(state: State) -> JSONResponse:
    """200 while requests are taken; 503 while they are not: the engine cannot run them, or the queue is full."""
    try:
        state.llm.check_ready()
    except TokenmillError as error:
        return _unavailable(error)
    return JSONResponse({"status": "ok"})


def _unavailable(error: TokenmillError) -> JSONResponse:
    return JSONResponse(error_body(str(error), 503, code=error.code), status_code=503)


@router.get("/version")
async def show_version() -> JSONResponse:
    """The version of tokenmill."""
    return JSONResponse({"version": __version__})


@router.get("/metrics", response_class=PlainTextResponse, responses=ANY_ROUTE_ERRORS)
async def show_metrics(request: Request, state: State) -> Response:
    """Metrics in Prometheus' text format."""
    content, content_type = state.metrics.render(request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": content_type})
