"""What all endpoints of one server share. Made once by `create_app`; endpoints receive it as `State`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from tokenmill.errors import ModelNotFoundError
from tokenmill.server.probe import GenerationProbe
from tokenmill.server.tokenizing import TokenizingPool
from tokenmill.telemetry.prometheus import ServerMetrics

if TYPE_CHECKING:
    from tokenmill.llm import LLM


@dataclass(frozen=True, slots=True)
class ServerState:
    """One server's engine and identity.

    Args:
        llm: answers the requests.
        model_name: the name under which clients ask for it.
        created: when the server was made, seconds since 1970.
        metrics: counts requests and renders `/metrics`.
        probe: sees whether tokens come out.
        tokenizing: threads on which requests are tokenized and submitted.
    """

    llm: LLM
    model_name: str
    created: int
    metrics: ServerMetrics
    probe: GenerationProbe
    tokenizing: TokenizingPool

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ModelNotFoundError: `name` is not the served model's; `field` is `model`.
        """
        if name is not None and name != self.model_name:
            raise ModelNotFoundError(
                f"The model '{name}' is not served here.", field="model", remedy=f"This server has '{self.model_name}'."
            )


async def _server_state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


State = Annotated[ServerState, Depends(_server_state)]
"""Parameter type of an endpoint that needs the server's state."""
