"""`create_app`: the application with all its endpoints, around one `LLM`. `serve` runs it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from tokenmill.sampling_params import MAX_SEQUENCES
from tokenmill.server import monitoring
from tokenmill.server.backpressure import Backpressure
from tokenmill.server.documentation import Schema, describe_api
from tokenmill.server.errors import install_error_handlers
from tokenmill.server.middleware import ApiKeyMiddleware, BodyLimitMiddleware, CountingMiddleware
from tokenmill.server.openai import chat, completions, models
from tokenmill.server.probe import GenerationProbe
from tokenmill.server.rate_limit import RateLimiter, RateLimitMiddleware
from tokenmill.server.state import ServerState
from tokenmill.server.tokenizing import TokenizingPool
from tokenmill.telemetry.process_metrics import ProcessSample
from tokenmill.telemetry.prometheus import ServerMetrics
from tokenmill.version import __version__

if TYPE_CHECKING:
    from tokenmill.llm import LLM

MAX_BODY_BYTES = 16 * 2**20
"""Larger request bodies are refused: room for a batch of two million token ids, none for filling the memory."""

_COUNTED_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})


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


def create_app(
    llm: LLM,
    *,
    served_model_name: str | None = None,
    api_key: str | None = None,
    requests_per_minute: int | None = None,
) -> FastAPI:
    """Make an application that answers with `llm`.

    Args:
        llm: stays the caller's: the application does not shut it down.
        served_model_name: the name under which clients ask for the model; None: the one that `llm` was made with.
        api_key: what clients of `/v1` have to send as bearer token; None: nothing.
        requests_per_minute: what one client (an address) may send to `/v1`; None: any number.

    Raises:
        InvalidParameterError: `requests_per_minute` is not positive.
    """
    app = _Application(needs_key=api_key is not None, by_model=_model_schemas(llm))
    model_name = served_model_name or llm.model_name

    metrics = ServerMetrics(
        llm.stats, lambda: llm.health().state == "healthy", lambda: _process_samples(llm), model_name=model_name
    )
    backpressure = Backpressure(lambda: sum(llm.stats().num_finished.values()))
    app.state.server = ServerState(
        llm, model_name, int(time.time()), metrics, GenerationProbe(llm), TokenizingPool(llm)
    )
    install_error_handlers(app, backpressure)
    app.add_middleware(BodyLimitMiddleware, max_bytes=MAX_BODY_BYTES)
    if requests_per_minute is not None:
        app.add_middleware(RateLimitMiddleware, limiter=RateLimiter(requests_per_minute))
    if api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=api_key)
    app.add_middleware(CountingMiddleware, outcomes=metrics.http, methods=_COUNTED_METHODS)
    for module in (chat, completions, models, monitoring):
        app.include_router(module.router)
    return app


def _process_samples(llm: LLM) -> list[ProcessSample]:
    samples = []
    for process in llm.health().processes:
        stats = process.stats
        samples.append(
            ProcessSample(
                name=process.name,
                is_ready=process.state == "ready",
                heartbeat_age=process.heartbeat_age,
                last_step_age=process.last_step_age,
                progress_age=process.progress_age,
                num_restarts=process.num_restarts,
                num_running=None if stats is None else stats.num_running,
                num_waiting=None if stats is None else stats.num_waiting,
                cache_usage=None if stats is None else stats.kv_cache.usage,
            )
        )
    return samples


def _model_schemas(llm: LLM) -> dict[str, Schema]:
    """What is accepted depends on the model: token ids, sequences that can run, whether no text gives a token."""
    running = llm.description
    takes_empty_text = llm.tokenizer is not None and bool(llm.tokenizer.encode(""))
    return {
        "prompt_id": {"exclusiveMaximum": running.model.vocab_size},
        "num_sequences": {"maximum": min(MAX_SEQUENCES, running.max_batch_size, running.max_num_tokens)},
        "prompt_text": {} if takes_empty_text else {"minLength": 1},
    }
