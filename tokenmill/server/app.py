"""`create_app`: the application with all its endpoints, around one `LLM`. `serve` runs it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastapi import FastAPI

from tokenmill.errors import TokenmillError
from tokenmill.server import monitoring
from tokenmill.server.errors import install_error_handlers
from tokenmill.server.middleware import ApiKeyMiddleware, BodyLimitMiddleware
from tokenmill.server.openai import chat, completions, models
from tokenmill.server.state import ServerState
from tokenmill.telemetry.prometheus import ServerMetrics
from tokenmill.version import __version__

if TYPE_CHECKING:
    from tokenmill.llm import LLM

MAX_BODY_BYTES = 16 * 2**20
"""Larger request bodies are refused: room for a batch of two million token ids, none for filling the memory."""


def create_app(llm: LLM, *, served_model_name: str | None = None, api_key: str | None = None) -> FastAPI:
    """Make an application that answers with `llm`.

    Args:
        llm: stays the caller's: the application does not shut it down.
        served_model_name: the name under which clients ask for the model; None: the one that `llm` was made with.
        api_key: what clients of `/v1` have to send as bearer token; None: nothing.
    """
    app = FastAPI(title="tokenmill", version=__version__, description="OpenAI-compatible API of tokenmill.")
    model_name = served_model_name or llm.model_name

    def is_healthy() -> bool:
        try:
            llm.check_health()
        except TokenmillError:
            return False
        return True

    metrics = ServerMetrics(llm.stats, is_healthy, model_name=model_name)
    app.state.server = ServerState(llm, model_name, int(time.time()), metrics)
    install_error_handlers(app)
    app.add_middleware(BodyLimitMiddleware, max_bytes=MAX_BODY_BYTES)
    if api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=api_key)
    for module in (chat, completions, models, monitoring):
        app.include_router(module.router)
    return app
