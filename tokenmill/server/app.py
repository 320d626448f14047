"""`create_app`: the application with all its endpoints, around one `LLM`. `serve` runs it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from tokenmill.errors import TokenmillError
from tokenmill.server import monitoring
from tokenmill.server.documentation import Schema, describe_api
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


class _Application(FastAPI):
    """FastAPI with tokenmill's own OpenAPI document."""

    def __init__(self, *, needs_key: bool, by_model: Mapping[str, Schema]) -> None:
        super().__init__(title="tokenmill", version=__version__, description="OpenAI-compatible API of tokenmill.")
        self._needs_key = needs_key
        self._by_model = by_model

    def openapi(self) -> dict[str, Any]:
        """The document; made once."""
        if self.openapi_schema is None:
            self.openapi_schema = describe_api(self, needs_key=self._needs_key, by_model=self._by_model)
        return self.openapi_schema


def create_app(llm: LLM, *, served_model_name: str | None = None, api_key: str | None = None) -> FastAPI:
    """Make an application that answers with `llm`.

    Args:
        llm: stays the caller's: the application does not shut it down.
        served_model_name: the name under which clients ask for the model; None: the one that `llm` was made with.
        api_key: what clients of `/v1` have to send as bearer token; None: nothing.
    """
    app = _Application(needs_key=api_key is not None, by_model=_model_schemas(llm))
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


def _model_schemas(llm: LLM) -> dict[str, Schema]:
    """What a prompt may be depends on the model: its token ids, and whether its tokenizer makes tokens of no text."""
    takes_empty_text = llm.tokenizer is not None and bool(llm.tokenizer.encode(""))
    return {
        "prompt_id": {"exclusiveMaximum": llm.description.model.vocab_size},
        "prompt_text": {} if takes_empty_text else {"minLength": 1},
    }
