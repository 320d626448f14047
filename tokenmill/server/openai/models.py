"""`GET /v1/models` and `GET /v1/models/{id}`: the one model that the server has."""

from __future__ import annotations

from fastapi import APIRouter, Response

from tokenmill.server.documentation import ANY_ROUTE_ERRORS, GENERATION_ERRORS
from tokenmill.server.openai.generation import json_response
from tokenmill.server.responses import ModelCard, ModelList
from tokenmill.server.state import ServerState, State

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", response_model=None, responses={200: {"model": ModelList}, **ANY_ROUTE_ERRORS})
async def list_models(state: State) -> Response:
    """List the served model."""
    return json_response(ModelList(object="list", data=[_card(state)]))


@router.get(
    "/v1/models/{model:path}",
    response_model=None,
    responses={200: {"model": ModelCard}, 404: GENERATION_ERRORS[404], **ANY_ROUTE_ERRORS},
)
async def retrieve_model(model: str, state: State) -> Response:
    """Describe the served model; 404 for any other name."""
    state.check_model(model)
    return json_response(_card(state))


def _card(state: ServerState) -> ModelCard:
    return ModelCard(
        id=state.model_name,
        object="model",
        created=state.created,
        owned_by="tokenmill",
        max_model_len=state.llm.max_seq_len,
    )
