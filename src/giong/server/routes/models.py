"""GET /v1/models and GET /v1/models/NAME: the base and the tuned models, as they are at this moment."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from giong.server import wire
from giong.server.errors import ApiError

router = APIRouter()


@router.get("/models")
async def list_models(request: Request) -> dict[str, Any]:
    """All models that are served."""
    return {"object": "list", "data": [wire.model_object(entry) for entry in await request.app.state.backend.models()]}


# Greedy, because hub names hold a slash and clients send it raw or as %2F.
@router.get("/models/{name:path}")
async def retrieve_model(name: str, request: Request) -> dict[str, Any]:
    """One model."""
    entries = await request.app.state.backend.models()
    for entry in entries:
        if entry["name"] == name:
            return wire.model_object(entry)
    served = ", ".join(entry["name"] for entry in entries)
    raise ApiError(f"The model {name!r} is not served here", 404, param="model", code="model_not_found", remedy=f"Served are: {served}.")
