"""`serve`: run the HTTP server until it is told to stop. Called by `tokenmill serve`."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.config import LOG_LEVELS

from tokenmill.errors import InvalidParameterError, did_you_mean
from tokenmill.server.app import create_app

if TYPE_CHECKING:
    from tokenmill.llm import LLM

logger = logging.getLogger("uvicorn.error")  # what a server says of itself; `log_level` is its level

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 2048
_CTRL_C_SECONDS = 5
"""Longest time that running requests get after Ctrl-C."""


def serve(
    llm: LLM,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    served_model_name: str | None = None,
    api_key: str | None = None,
    requests_per_minute: int | None = None,
    log_level: str = "info",
    shutdown_timeout: float = 30.0,
    on_start: Callable[[str], None] | None = None,
) -> None:
    """Answer HTTP requests until SIGTERM or Ctrl-C (SIGINT), in the main thread.

    On the signal no new connections are taken; running requests may finish for `shutdown_timeout` seconds, after Ctrl-C
    for 5 at the most, and are cancelled then. A second Ctrl-C does not wait.

    Args:
        llm: stays the caller's, to be shut down after this returns.
        host: address to listen on; `0.0.0.0` for all.
        port: 0 picks a free one.
        served_model_name, api_key, requests_per_minute: as in `create_app`.
        log_level: uvicorn's: `critical`, `error`, `warning`, `info`, `debug` or `trace`.
        shutdown_timeout: seconds.
        on_start: called with the server's URL once the port is open.

    Raises:
        InvalidParameterError: the address cannot be listened on, or there is no such `log_level`.
    """
    if log_level not in LOG_LEVELS:
        raise InvalidParameterError(
            f"log_level is '{log_level}'.", field="log_level", remedy=did_you_mean(log_level, LOG_LEVELS)
        )
    app = create_app(llm, served_model_name=served_model_name, api_key=api_key, requests_per_minute=requests_per_minute)
    listener = open_listener(host, port)
    config = uvicorn.Config(
        app, log_level=log_level, timeout_graceful_shutdown=max(1, round(shutdown_timeout)), ws="none", lifespan="off"
    )
    with listener, _signals_end_here(), _quiet_cancellation():
        if on_start is not None:
            on_start(_url(listener))
        _Server(config).run(sockets=[listener])


class _Server(uvicorn.Server):
    """A server that does not let somebody at a terminal wait for long."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of both signals."""
        if sig == signal.SIGINT:
            patience = self.config.timeout_graceful_shutdown
            self.config.timeout_graceful_shutdown = min(_CTRL_C_SECONDS, patience or _CTRL_C_SECONDS)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests finish, for a while."""
        num_running = len(self.server_state.tasks)
        if num_running:
            logger.warning(
                "%d requests may finish within %d s; Ctrl-C ends them now.",
                num_running,
                self.config.timeout_graceful_shutdown,
            )
        await super().shutdown(sockets)


def open_listener(host: str, port: int) -> socket.socket:
    """A socket that listens for HTTP connections.

    Raises:
        InvalidParameterError: the address does not exist, is in use or may not be used.
    """
    if not 0 <= port < 2**16:
        raise InvalidParameterError(f"Port {port} does not exist.", field="port", remedy="Use 0 to 65535.")
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        # With the protocol spelled out, which socket.create_server does not do, asyncio switches Nagle's algorithm off
        # for accepted connections; with it each answer after the first on a connection comes 40 ms late.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        is_no_address = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        raise InvalidParameterError(
            f"Cannot listen on {host} port {port}: {error}.",
            field="host" if is_no_address else "port",
            remedy="Give an address of this machine, or 0.0.0.0 for all of them."
            if is_no_address
            else "Choose another port, or 0 for any free one.",
        ) from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if listener.family == socket.AF_INET6:
        host = f"[{host}]"
    return f"http://{host}:{port}"


@contextmanager
def _quiet_cancellation() -> Iterator[None]:
    """Requests that were cancelled because the server ends are no errors of the application: no tracebacks."""

    def is_news(record: logging.LogRecord) -> bool:
        return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)

    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


@contextmanager
def _signals_end_here() -> Iterator[None]:
    """After its orderly end uvicorn raises the signal once more for the handler that was there before; that handler
    does nothing here, so that `serve` returns and its caller can clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ignore(signal_number: int, frame: FrameType | None) -> None:
        return None

    previous = {number: signal.signal(number, ignore) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
