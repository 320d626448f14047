"""A real server on a free port: uvicorn on a thread, to be talked to over a socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import uvicorn

from tokenmill.llm import LLM
from tokenmill.server.app import create_app
from tokenmill.server.run import open_listener


@dataclass(frozen=True)
class LiveServer:
    """A running server.

    Args:
        url: without a path.
        llm: its engine.
    """

    url: str
    llm: LLM

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """The official client; errors are not retried."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def async_client(self) -> openai.AsyncOpenAI:
        """The official asynchronous client; errors are not retried."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def wait_until_idle(self, timeout: float = 20.0) -> None:
        """Wait until no request runs or waits and all blocks are free, then check that none is lost."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            stats = self.llm.stats()
            if not stats.num_running and not stats.num_waiting and stats.kv_cache.usage == 0.0:
                self.llm.check_integrity()
                return
            time.sleep(0.01)
        raise AssertionError(f"still busy after {timeout} s: {stats}")


@contextmanager
def live_server(llm: LLM, **options: Any) -> Iterator[LiveServer]:
    """Serve `llm` while the context lasts; `options` are those of `create_app`."""
    app = create_app(llm, **options)
    config = uvicorn.Config(app, log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    with open_listener("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="test-server")
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        try:
            yield LiveServer(f"http://127.0.0.1:{listener.getsockname()[1]}", llm)
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive(), "the server does not end"
