"""The HTTP server: OpenAI's API, health and metrics on top of one `LLM`. `tokenmill serve` calls `serve`."""

from tokenmill.server.app import create_app
from tokenmill.server.run import serve

__all__ = ["create_app", "serve"]
