"""`tokenmill serve`: the model behind OpenAI's HTTP API."""

from __future__ import annotations

import json
import shlex
from enum import StrEnum
from typing import Annotated

import typer

from tokenmill.cli.command import command, examples
from tokenmill.cli.loading import loaded_llm
from tokenmill.cli.options import DEFAULT_MODEL, ServingOptions

_EPILOG = examples(
    ("Serve the demo model on port 8000 of this machine", "tokenmill serve"),
    ("Serve a model to the network, with a key", "tokenmill serve Qwen/Qwen3-0.6B --host 0.0.0.0 --api-key SECRET"),
    (
        "Ask it",
        "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' "
        '-d \'{"model": "smollm2:135m", "messages": [{"role": "user", "content": "Hello!"}]}\'',
    ),
)


class LogLevel(StrEnum):
    """What `--log-level` takes."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    DEBUG = "debug"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "serve", epilog=_EPILOG)(serve)


def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The model to serve.", show_default=DEFAULT_MODEL)
    ] = None,
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Refuse requests without it.", show_default="none")
    ] = None,
    requests_per_minute: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Refuse what a client (an address) sends beyond it.", show_default="no limit"
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model in the API.", show_default="MODEL")
    ] = None,
    log_level: Annotated[
        LogLevel, typer.Option(help="How much the server says on stderr; info is a line for each request.")
    ] = LogLevel.WARNING,
    model_options: ServingOptions,
) -> None:
    """Serve a model over HTTP, as OpenAI's API: chat and text completions, health, Prometheus metrics.

    Any OpenAI client works with base_url="http://HOST:PORT/v1".
    """
    arguments = model_options.llm_arguments(model)
    from tokenmill.server.run import open_listener
    from tokenmill.server.run import serve as serve_llm

    open_listener(host, port).close()  # an address that cannot be had is better known before the model is loaded
    with loaded_llm(arguments) as llm:
        name = served_model_name or llm.model_name
        serve_llm(
            llm,
            host,
            port,
            api_key=api_key,
            requests_per_minute=requests_per_minute,
            served_model_name=served_model_name,
            log_level=log_level.value,
            on_start=lambda url: _announce(name, url, needs_key=api_key is not None),
        )


def _announce(model_name: str, url: str, *, needs_key: bool) -> None:
    """Say where the server is and how to ask it, on stdout."""
    reachable = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    body = json.dumps({"model": model_name, "messages": [{"role": "user", "content": "Why is the sky blue?"}]})
    key = "-H 'Authorization: Bearer KEY' " if needs_key else ""
    typer.echo(f"{model_name} is served at {url}/v1 (Ctrl-C stops it)")
    header = "-H 'Content-Type: application/json'"
    typer.echo(f"  try      curl {reachable}/v1/chat/completions {key}{header} -d {shlex.quote(body)}")
    typer.echo(f"  health   {reachable}/health")
    typer.echo(f"  metrics  {reachable}/metrics")
